"""docs/samples/levels, which README.md lets a platform engineer try: keys, policy, models and batch go together."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aim_kserve.identity import keys
from aim_profile.cli.app import app
from aim_runtime.batch.lines import Input
from aim_runtime.dry_run import dry_run
from aim_runtime.keys import main as keys_verb
from aim_runtime.qos.policy import QosPolicy
from aim_runtime.settings import RuntimeSettings

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "docs/samples/levels"
COMMAND = r"^\.venv/bin/aim-runtime keys (new .*) > (\.run/[a-z]+\.key)$"
SERVE = [
    *("--models", "docs/samples/levels/models.yaml", "--placement", "plan.yaml"),
    *("--node", "docs/samples/several/node.yaml", "--qos_policy", "docs/samples/levels/qos.yaml"),
    *("--api_keys", ".run/keys.yaml"),
]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that the script's commands make, in a folder that looks like the top of a checkout."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / ".run").mkdir()
    monkeypatch.chdir(tmp_path)
    commands = re.findall(COMMAND, (SAMPLE / "keys.sh").read_text(), re.MULTILINE)
    texts = []
    for command, _ in commands:
        with redirect_stdout(StringIO()) as out:
            assert keys_verb(shlex.split(command)) == 0
        texts.append(out.getvalue().strip())
    return texts


def test_the_script_makes_four_keys_of_three_tenants(made: list[str]) -> None:
    held = {key.id: key for key in keys.read(Path(".run/keys.yaml")).keys}
    assert len(made) == len(held) == 4
    assert {key.tenant for key in held.values()} == {"product", "research", "platform"}
    assert {name: key.qos_class for name, key in held.items()} == {
        "console": "high",
        "notebooks": "medium",
        "nightly": "low",
        "ops": None,
    }
    assert held["ops"].scopes == ("admin", "metrics")
    file = Path(".run/keys.yaml").read_text()
    assert not any(text in file for text in made)


def test_policy_and_batch_are_of_those_tenants_and_models(made: list[str]) -> None:
    policy = QosPolicy.read(SAMPLE / "qos.yaml")
    tenants = {key.tenant for key in keys.read(Path(".run/keys.yaml")).keys}
    assert (len(policy.classes), len(policy.tenants), len(policy.limits)) == (3, 1, 2)
    assert {*policy.tenants, *(each.tenant for each in policy.limits if each.tenant)} <= tenants
    source = Input(SAMPLE / "batch.jsonl")
    assert source.count == 3
    source.close()
    lines = (SAMPLE / "batch.jsonl").read_text().splitlines()
    nightly = next(key for key in keys.read(Path(".run/keys.yaml")).keys if key.id == "nightly")
    assert {json.loads(line)["body"]["model"] for line in lines} == set(nightly.models or ())


@pytest.mark.model
def test_two_models_would_be_started_with_that_policy(
    made: list[str], embedded_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".models").mkdir()
    Path(".models/smollm2").symlink_to(embedded_model.parent)
    several = "docs/samples/several"
    planned = CliRunner().invoke(
        app, ["plan", f"{several}/fleet.yaml", f"{several}/workloads.yaml", "--out", "plan.yaml"]
    )
    assert planned.exit_code == 0, planned.output
    assert dry_run(RuntimeSettings.load([*SERVE, "--dry_run"], {}, prog="p", description="")) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^model (\w+): llama_cpp on", shown, re.MULTILINE) == ["chat", "draft"]
    assert '"ttft_ms": 5000.0' in shown


def test_readme_prints_these_commands() -> None:
    said = re.sub(r" \\\n *", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert "sh docs/samples/levels/keys.sh" in said
    assert f".venv/bin/aim-runtime {' '.join(SERVE)}" in said
