"""docs/samples/several: what README.md and docs/models.md let a newcomer try."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_runtime.dry_run import dry_run
from aim_runtime.models.file import load_models
from aim_runtime.settings import RuntimeSettings

ROOT = Path(__file__).parents[2]
SAMPLE = "docs/samples/several"
PLAN = ["plan", f"{SAMPLE}/fleet.yaml", f"{SAMPLE}/workloads.yaml", "--out", "plan.yaml"]
SERVE = ["--models", f"{SAMPLE}/models.yaml", "--placement", "plan.yaml", "--node", f"{SAMPLE}/node.yaml"]

pytestmark = pytest.mark.model


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
