"""docs/samples/several, which README.md and docs/models.md let a newcomer try; the file that docs/models.md shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.nodes.emulated import emulate, export_node
from aim_runtime.dry_run import dry_run
from aim_runtime.models.file import load_models
from aim_runtime.settings import RuntimeSettings
from model_directory import write_model

ROOT = Path(__file__).parents[2]
SAMPLE = "docs/samples/several"
PLAN = ["plan", f"{SAMPLE}/fleet.yaml", f"{SAMPLE}/workloads.yaml", "--out", "plan.yaml"]
SERVE = ["--models", f"{SAMPLE}/models.yaml", "--placement", "plan.yaml", "--node", f"{SAMPLE}/node.yaml"]


@pytest.fixture
def checkout(embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the top of a checkout with the model in it."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / ".models").mkdir()
    (tmp_path / ".models/smollm2").symlink_to(embedded_model.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_the_pages_print_these_commands(page: str) -> None:
    said = re.sub(r" \\\n *", " ", (ROOT / page).read_text(encoding="utf-8"))
    assert f".venv/bin/aim-profile {' '.join(PLAN)}" in said
    assert f".venv/bin/aim-runtime {' '.join(SERVE)}" in said


@pytest.mark.model
def test_the_samples_are_planned_and_each_model_gets_its_own_partition(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = CliRunner().invoke(app, PLAN)
    assert planned.exit_code == 0, planned.output
    settings = RuntimeSettings.load([*SERVE, "--dry_run", "-o", "json"], {}, prog="p", description="")
    assert dry_run(settings) == 0
    chat, draft = json.loads(capsys.readouterr().out)
    assert [(each["model"], each["devices"][0]["partition"], each["cpus"]) for each in (chat, draft)] == [
        ("chat", 0, [0]),
        ("draft", 1, [1]),
    ]
    listed, _ = load_models(checkout / SAMPLE / "models.yaml", settings)
    assert [variant.weights for variant in listed.variants] == [{"chat": 90, "draft": 10}]


def test_the_file_on_the_page_is_read_and_its_models_are_assigned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"## models.yaml\n\n```yaml\n(.*?)```", page, re.S)
    (tmp_path / "smollm2.gguf").write_bytes(b"GGUF")
    llama = write_model(tmp_path / "llama")
    file, node = tmp_path / "models.yaml", tmp_path / "node.yaml"
    file.write_text(text.replace("/models/llama", str(llama)).replace("/models/smollm2", str(tmp_path / "smollm2")))
    node.write_text(export_node(emulate("MI300X", cards=1, partition="CPX/NPS4")))
    told = ["--dry_run", "-o", "json", "--models", str(file), "--node", str(node)]
    assert dry_run(RuntimeSettings.load(told, {}, prog="p", description="")) == 0
    first, second, draft = json.loads(capsys.readouterr().out)
    assert [[device["partition"] for device in each["devices"]] for each in (first, second)] == [[0, 1], [2, 3]]
    assert first["engine_args"]["kv-cache-dtype"] == "fp8"
    assert (draft["model"], draft["engine"]) == ("draft", "llama_cpp")
