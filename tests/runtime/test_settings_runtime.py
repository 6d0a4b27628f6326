"""The runtime's own settings and the choice of an engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aim_kserve.errors import StartupError
from aim_kserve.settings import ServerSettings, SettingsError, heading_of
from aim_runtime.choose import create_engine, detect
from aim_runtime.settings import RuntimeSettings


def load(*argv: str, **env: str) -> RuntimeSettings:
    return RuntimeSettings.load(argv, env, prog="aim-runtime", description="")


def test_defaults_are_kserves() -> None:
    settings = load()
    assert (settings.model_dir, settings.engine) == (Path("/mnt/models"), "auto")
    assert (settings.http_port, settings.grpc_port) == (8080, 8081)


def test_annotations(tmp_path: Path) -> None:
    file = tmp_path / "annotations"
    file.write_text('aim.amd.com/max-model-len="4096"\naim.amd.com/max-concurrency="16"\nother.io/x="y"\n')
    settings = load("--annotations_file", str(file), "--max_concurrency", "2")
    assert (settings.max_model_len, settings.max_concurrency) == (4096, 2)  # a flag wins over an annotation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--dtype bfloat16 --enforce-eager", ["--dtype", "bfloat16", "--enforce-eager"]),
        ('{"dtype": "bfloat16", "enforce-eager": true}', {"dtype": "bfloat16", "enforce-eager": True}),
        ("", []),
        ("""--hf-overrides '{"a": 1}'""", ["--hf-overrides", '{"a": 1}']),
    ],
)
def test_engine_args(text: str, expected: object) -> None:
    assert load("--engine", "vllm", "--engine_args", text).engine_args == expected
    assert load("--engine", "vllm", AIM_ENGINE_ARGS=text).engine_args == expected


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--engine", "tgi"], "--engine"),
        (["--max_model_len", "0"], "--max_model_len"),
        (["--max_concurrency", "many"], "--max_concurrency"),
        (["--engine", "vllm", "--engine_args", '{"dtype": '], "--engine_args"),
        (["--engine", "vllm", "--engine_args", "'unclosed"], "--engine_args"),
        (["--engine", "vllm", "--threads", "2"], "--threads belongs to the llama_cpp engine; this is vllm"),
        (["--engine", "llama_cpp", "--engine_args", "--dtype half"], "--engine_args belongs to the vllm engine"),
        (["--model_name", "has space"], "--model_name"),
        (["--model_name", "a\x1b[2J"], "--model_name: has a character that cannot be printed"),
        (["--model_name", "a/.."], "--model_name: has . or .. between slashes"),
        (["--threads", "513"], "--threads: Input should be less than or equal to 512"),
        (["--model_dir", ""], "--model_dir: empty: give a path, or leave it out"),
        (["--models", ""], "--models: empty: give a path, or leave it out"),
    ],
)
def test_wrong_settings_are_named(argv: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load(*argv)


def test_auto_also_checks_whose_setting_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(StartupError, match="--tensor_parallel_size belongs to the vllm engine; this is llama_cpp"):
        create_engine(load("--model_dir", str(tmp_path), "--tensor_parallel_size", "2"))


def test_detection(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"found neither \*\.gguf .* nor config\.json with \*\.safetensors"):
        detect(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(StartupError, match=str(tmp_path)):
        detect(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert detect(tmp_path) == "vllm"
    (tmp_path / "model.Q4.gguf").touch()
    with pytest.raises(StartupError, match="choose with --engine"):
        detect(tmp_path)
    assert detect(tmp_path / "model.Q4.gguf") == "llama_cpp"
    with pytest.raises(StartupError, match=r"config\.json: not a \.gguf file"):
        detect(tmp_path / "config.json")
    with pytest.raises(StartupError, match="nowhere: no such file or directory"):
        detect(tmp_path / "nowhere")


def test_an_engine_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(StartupError, match="the vllm engine is not installed in this environment: "):
        create_engine(load("--engine", "vllm", "--model_dir", str(tmp_path)))


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aim_runtime", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_every_setting_of_the_runtime_stands_under_a_heading_of_help() -> None:
    listed = [name for names in RuntimeSettings.HEADINGS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= RuntimeSettings.model_fields.keys()
    under = {name: heading_of(name, RuntimeSettings) for name in RuntimeSettings.model_fields}
    assert {name for name, heading in under.items() if heading == "server"} <= ServerSettings.model_fields.keys()


def test_wrong_flags_exit_2_and_help_0() -> None:
    unknown = run("--modl_name", "x")
    assert (unknown.returncode, "--modl_name" in unknown.stderr) == (2, True)
    wrong = run("--http_port", "http")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: --http_port: ")
    shown = run("--help").stdout
    assert "aim.amd.com/max-model-len" in shown
    assert [word for word in VERBS if f"\n  aim-runtime {word} " not in shown] == []


VERBS = ("keys", "cache", "batch", "measure", "compare")


def test_a_verb_that_is_none_is_told_which_there_are() -> None:
    wrong = run("key", "list")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: 'key' is no verb: give keys, cache, batch, measure, compare")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_of_its_own(verb: str) -> None:
    shown = run(verb, "--help")
    assert (shown.returncode, shown.stdout.startswith(f"usage: aim-runtime {verb} ")) == (0, True)


@pytest.mark.model
def test_a_model_that_cannot_be_loaded_ends_the_process_with_one_line(tmp_path: Path) -> None:
    missing = run("--model_dir", str(tmp_path))
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith(f"error: --model_dir {tmp_path}: found neither")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\x00" * 100)
    broken = run("--model_dir", str(tmp_path), "--http_port", "0", "--grpc_port", "0", "--host", "127.0.0.1")
    assert broken.returncode == 1
    last = broken.stderr.splitlines()[-1]
    assert last.startswith("error: model model: ")
    assert "broken.gguf" in last
    assert "Traceback" not in broken.stderr


def test_only_the_chosen_engine_is_imported() -> None:
    script = (
        "import sys; from aim_runtime.choose import create_engine; from aim_runtime.settings import RuntimeSettings\n"
        "create_engine(RuntimeSettings(engine='llama_cpp'))\n"
        "print([name for name in ('vllm', 'torch', 'aim_runtime.engines.vllm.engine') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_left_empty_belongs_to_no_engine() -> None:
    """Templates of pods leave variables empty."""
    assert load("--engine", "llama_cpp", AIM_ENGINE_ARGS="").engine_args == []


@pytest.mark.parametrize(
    ("argv", "factory", "expected"),
    [
        (
            [
                *("--engine", "llama_cpp", "--max_model_len", "512", "--max_concurrency", "3", "--threads", "2"),
                *("--adapters", "a=/x,b=/y", "--deterministic"),
            ],
            "aim_runtime.engines.llama_cpp.engine.LlamaCppEngine",
            {
                **{"max_model_len": 512, "slots": 3, "threads": 2, "max_waiting": 256, "stall_timeout_s": 60},
                **{"kv_cache_memory_bytes": 512 * 2**20, "parked_memory_bytes": None, "deterministic": True},
                "adapters": {"a": Path("/x"), "b": Path("/y")},
            },
        ),
        (
            [
                "--engine",
                "vllm",
                "--max_concurrency",
                "3",
                "--tensor_parallel_size",
                "4",
                "--engine_args",
                "--dtype half",
                "--adapters",
                '{"a": "/x"}',
            ],
            "aim_runtime.engines.vllm.engine.VllmEngine",
            {
                **{"max_model_len": None, "max_num_seqs": 3, "tensor_parallel_size": 4},
                **{"engine_args": ["--dtype", "half"], "adapters": {"a": Path("/x")}, "deterministic": False},
            },
        ),
    ],
)
def test_settings_reach_the_engine(
    argv: list[str], factory: str, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr(factory, lambda *args, **kwargs: (args, kwargs))
    created = create_engine(load(*argv, "--model_dir", str(tmp_path), "--model_name", "m"))
    assert created == ((tmp_path,), {"served_model_name": "m", **expected})
