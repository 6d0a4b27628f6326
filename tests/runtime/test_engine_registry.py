"""Engines by name: ours without any installed metadata, others by entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from aim_runtime.engines import registry
from aim_runtime.engines.base import EngineSpec, ModelLoadError
from aim_runtime.settings import RuntimeSettings
from served import Served

KIND = """
from pathlib import Path
from pydantic import Field
from aim_runtime.engines.kind import EngineKind, EngineSettings

class Settings(EngineSettings):
    words: int = Field({default}, ge=1, description="words of an answer")

def create(spec, settings):
    from fake_engine import FakeEngine
    return FakeEngine(spec.served_model_name, slots=settings.words, name="other")

KIND = EngineKind(Settings, create, lambda path: any(path.glob("*{suffix}")), reads="*{suffix}")
"""


def install(site: Path, distribution: str, engine: str, source: str, module: str = "") -> None:
    """A distribution as pip leaves it: a module, and metadata with an entry point."""
    module = module or distribution
    (site / f"{module}.py").write_text(source)
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[aim_runtime.engines]\n{engine} = {module}:KIND\n")


def environment(site: Path) -> dict[str, str]:
    """With ``site`` among the places of installed distributions."""
    paths = [str(site), os.environ.get("PYTHONPATH", ""), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment(site))


def run(site: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return python(site, "-m", "aim_runtime", *flags)


CREATE = """
import sys
from aim_runtime.choose import create_engine
from aim_runtime.settings import RuntimeSettings
settings = RuntimeSettings.load(sys.argv[1:], {}, prog="p", description="d")
engine = create_engine(settings)
print(engine.name, engine.slots, [name for name in ("vllm", "torch", "llama_cpp") if name in sys.modules])
"""


def test_an_installed_engine_is_chosen_by_name_and_by_its_model(tmp_path: Path) -> None:
    install(tmp_path, "other", "other", KIND.format(default=3, suffix=".other"))
    by_name = python(tmp_path, "-c", CREATE, "--engine", "other", "--words", "5")
    assert by_name.stdout == "other 5 []\n", by_name.stderr
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.other").touch()
    by_model = python(tmp_path, "-c", CREATE, "--model_dir", str(tmp_path / "model"))
    assert by_model.stdout == "other 3 []\n", by_model.stderr


def test_an_installed_engine_serves(tmp_path: Path) -> None:
    """In a process of its own, as ours do."""
    install(tmp_path, "other", "other", KIND.format(default=3, suffix=".other"))
    (tmp_path / "weights.other").touch()
    with Served(
        ["-m", "aim_runtime", "--model_dir", str(tmp_path), "--words", "7"], env=environment(tmp_path)
    ) as served:
        answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}).json()
        assert answer["choices"][0]["text"] == "the quick"
        assert httpx.get(f"{served.url}/version").json()["engine"] == "other"


def test_an_installed_engines_settings_are_flags_in_a_group_of_their_own(tmp_path: Path) -> None:
    install(tmp_path, "other", "other", KIND.format(default=3, suffix=".other"))
    help_text = run(tmp_path, "--help").stdout
    assert [line for line in help_text.splitlines() if line.endswith(" engine:")] == [
        *(f"{name} engine:" for name in registry.BUILT_IN if registry.kind(name).settings.model_fields),
        "other engine:",
    ]
    wrong = run(tmp_path, "--engine", "other", "--words", "0")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: --words: Input should be greater than or equal to 1 (got '0')\n",
    )
    foreign = run(tmp_path, "--engine", "other", "--threads", "2")
    assert "--threads belongs to the llama_cpp engine; this is other: leave it out" in foreign.stderr
    ours = run(tmp_path, "--engine", "llama_cpp", "--words", "2")
    assert "--words belongs to the other engine; this is llama_cpp: leave it out" in ours.stderr


def test_an_installed_engine_changes_no_choice_that_was_clear(tmp_path: Path) -> None:
    install(tmp_path, "other", "other", KIND.format(default=3, suffix=".gguf"))
    (tmp_path / "m.gguf").touch()
    script = (
        "import sys; from aim_runtime.choose import detect; from pathlib import Path; print(detect(Path(sys.argv[1])))"
    )
    assert python(tmp_path, "-c", script, str(tmp_path)).stdout == "llama_cpp\n"


def test_a_name_is_never_taken_over(tmp_path: Path) -> None:
    install(tmp_path, "greedy", "vllm", KIND.format(default=3, suffix=".other"))
    done = run(tmp_path, "--engine", "vllm")
    assert done.returncode == 2
    assert "the engine name 'vllm' is claimed by aim-kserve itself and greedy: uninstall all but one" in done.stderr
    assert run(tmp_path, "--engine", "llama_cpp", "--model_dir", str(tmp_path / "none")).returncode == 1


def test_two_distributions_do_not_share_a_name(tmp_path: Path) -> None:
    install(tmp_path, "one", "other", KIND.format(default=3, suffix=".other"))
    install(tmp_path, "two", "other", KIND.format(default=4, suffix=".other"))
    assert "is claimed by one and two" in run(tmp_path, "--engine", "other").stderr


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError: No module named 'nothing_of"),
        ("KIND = 3", "is no EngineKind"),
        (KIND.format(default=3, suffix="x").replace("words", "host"), "'host' already means something else"),
        (KIND.format(default=3, suffix="x").replace("words", "threads"), "'threads' already means something else"),
    ],
)
def test_a_broken_engine_is_in_nobodys_way_until_it_is_chosen(tmp_path: Path, source: str, says: str) -> None:
    install(tmp_path, "other", "other", source)
    assert run(tmp_path, "--help").returncode == 0
    chosen = run(tmp_path, "--engine", "other")
    assert (chosen.returncode, chosen.stderr.count("\n")) == (2, 1)
    assert says in chosen.stderr


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (EngineSpec("tgi", Path(), "m"), r"'tgi' is no engine: the engines here are llama_cpp, vllm"),
        (
            EngineSpec("llama_cpp", Path(), "m", options={"thraeds": 2}),
            "thraeds: not a setting of the llama_cpp",
        ),
        (EngineSpec("llama_cpp", Path(), "m", options={"threads": "many"}), r"threads: .* \(got 'many'\)"),
        (EngineSpec("vllm", Path(), "m", options={"threads": 2}), "threads: not a setting of the vllm engine"),
    ],
)
def test_wrong_options_are_named(spec: EngineSpec, says: str) -> None:
    with pytest.raises(ModelLoadError, match=says):
        registry.create(spec)


def test_options_come_as_values_or_as_text() -> None:
    spec = EngineSpec("vllm", Path(), "m", options={"engine_args": "--dtype half"})
    settings = registry.kind("vllm").settings.model_validate(dict(spec.options))
    assert settings.model_dump()["engine_args"] == ["--dtype", "half"]


@pytest.mark.parametrize(("options", "room"), [({}, None), ({"adapters": {}}, True), ({"adapters": {"a": "/a"}}, True)])
def test_vllm_keeps_room_for_adapters_where_the_setting_is_there(options: dict[str, object], room: bool | None) -> None:
    """Empty is what a process that is started again is told: its adapters are loaded one by one."""
    kind = registry.kind("vllm")
    engine: Any = kind.create(EngineSpec("vllm", Path("/x"), "m"), kind.settings.model_validate(options))
    assert engine._ours.get("enable_lora") is room


def test_an_empty_setting_is_none() -> None:
    settings = RuntimeSettings(engine="vllm", adapters={}, engine_args=[])
    assert settings.engine_options("vllm") == {}
