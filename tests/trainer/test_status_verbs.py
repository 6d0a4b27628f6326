"""Runs as a person asks for them: one by how far it is, several side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aim_trainer.cli.app import app
from aim_trainer.metrics.json_lines import JsonLines
from aim_trainer.metrics.progress import Progress
from aim_trainer.metrics.records import Evaluation, Note, Record, Saved, Step
from aim_trainer.run_directory import RunDirectory

JOB = """\
apiVersion: aim.amd.com/v1alpha1
kind: FineTuningJob
metadata: {name: bot}
spec:
  baseModel: {modelId: org/model}
  dataset: {source: chats.jsonl}
  hyperparameters: {learningRate: RATE}
"""


def made(folder: Path, rate: str = "0.001", loss: float = 1.5, tuned: dict[str, float] | None = None) -> RunDirectory:
    run = RunDirectory(folder)
    folder.mkdir(parents=True)
    run.job.write_text(JOB.replace("RATE", rate))
    records: list[Record] = [
        Evaluation(0, {"eval_loss": 3.0}),
        *(Step(at, 20, at / 10, loss, 1e-4, 0.5, 1000, 300, 0.5, (20 - at) * 0.5) for at in range(1, 11)),
        Saved(10, "checkpoints/step-000010", 100, 0.1),
        Evaluation(10, {"eval_loss": 2.0}),
        Note("paused", "SIGTERM"),
    ]
    for sink in (JsonLines(run.metrics), Progress(run.progress)):
        for record in records:
            sink.tell(record)
        sink.close()
    if tuned is not None:
        run.evaluation.write_text(json.dumps({"base": {}, "tuned": tuned}))
    return run


def asked(*command: str) -> Any:
    done = CliRunner().invoke(app, [*command, "-o", "json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_how_far_a_run_is(tmp_path: Path) -> None:
    made(tmp_path / "run")
    found = asked("status", str(tmp_path / "run"))
    assert (found["job"], found["state"], found["checkpoints"]) == ("bot", "paused", [10])
    assert found["trainerStatus"]["progressPercentage"] == 50
    assert found["evaluations"] == [{"step": 0, "eval_loss": 3.0}, {"step": 10, "eval_loss": 2.0}]
    table = CliRunner().invoke(app, ["status", str(tmp_path / "run")]).stdout
    assert "10 of 20 (50 %), epoch 1.00" in table
    assert "2,000" in table  # tokens/s


def test_a_run_that_has_only_begun_has_a_status(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB.replace("RATE", "0.001"))
    found = asked("status", str(tmp_path))
    assert (found["state"], found["trainerStatus"]) == ("no step yet", {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"trainerStatus": 1}', "[" * 100_000])
def test_progress_that_cannot_be_read_is_left_out(tmp_path: Path, text: str) -> None:
    made(tmp_path / "run").progress.write_text(text)
    assert asked("status", str(tmp_path / "run"))["trainerStatus"] == {}


@pytest.mark.parametrize("command", ["status", "compare"])
def test_a_directory_without_a_run_is_refused(tmp_path: Path, command: str) -> None:
    done = CliRunner().invoke(app, [command, str(tmp_path)])
    assert (done.exit_code, "no run is there" in done.output) == (3, True)


def test_runs_side_by_side_by_what_differs_and_what_they_came_to(tmp_path: Path) -> None:
    made(tmp_path / "a", "0.001", 1.5, {"eval_loss": 1.25, "rouge_l": 0.5})
    made(tmp_path / "b", "0.002", 1.0)
    one, other = asked("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert (one["job"], other["job"]) == (
        {"hyperparameters.learningRate": 0.001},
        {"hyperparameters.learningRate": 0.002},
    )
    assert (one["eval_loss"], one["rouge_l"], other["eval_loss"], "rouge_l" in other) == (1.25, 0.5, 2.0, False)
    assert (one["train_loss"], other["train_loss"], one["tokens_per_second"]) == (1.5, 1.0, 2000)
    table = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")]).stdout
    assert table.splitlines()[0].split() == ["set", "a", "b"]


def test_runs_that_are_called_alike_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        made(tmp_path / folder / "run")
    table = CliRunner().invoke(app, ["compare", str(tmp_path / "x/run"), str(tmp_path / "y/run")]).stdout
    assert str(tmp_path / "x/run") in table
