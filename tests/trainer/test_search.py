"""Trials on a tiny model, under Ray Tune: one fails, one is stopped early, and the best one run again is as good."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import read_job
from aim_trainer.recipe.workers import Workers
from aim_trainer.run_directory import RunDirectory
from aim_trainer.search.results import Found
from aim_trainer.search.search import search
from aim_trainer.search.trial import prepared, trial_job
from aim_trainer.worker import work
from tiny_models import conversations
from tiny_runs import tiny_job

RATE = "hyperparameters.learningRate"


def searching(model: Path, rows: Path, **changed: Any) -> FineTuningJob:
    raw = tiny_job(model, "full", maxSteps=10).model_dump(mode="json", by_alias=True, exclude_unset=True)
    raw["spec"]["dataset"] |= {"source": str(rows), "validation": {"share": 0.3}}
    raw["spec"]["validation"] = {"everySteps": 2}
    values = {"categorical": [3e-3, 1e-3, 1e-6, 2e-6]}
    raw["spec"]["search"] = {"numTrials": 4, "parameters": [{"name": RATE, "searchSpace": values}], **changed}
    return FineTuningJob.model_validate(raw)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations(40)))
    return file


@pytest.fixture(scope="module")
def done(tiny: Callable[[str], Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path]:
    """Four trials, one after the other."""
    root = tmp_path_factory.mktemp("search") / "found"
    return search(searching(tiny("llama"), rows, algorithm="random", seed=1), RunDirectory(root)), root


@pytest.mark.ray
def test_four_trials_one_stopped_early(done: tuple[Found, Path]) -> None:
    found, root = done
    assert len(found.trials) == 4
    ends = [trial.end for trial in found.trials]
    assert "stopped" in ends
    assert "finished" in ends
    assert all(trial.step < 10 for trial in found.trials if trial.end == "stopped")
    assert found.best is not None
    assert found.best.value == min(trial.value or 99 for trial in found.trials)
    with (root / "results.csv").open() as opened:
        assert [row["trial"] for row in csv.DictReader(opened)] == [trial.name for trial in found.trials]
    assert (root / "search.svg").is_file()


@pytest.mark.ray
def test_trials_share_the_tokenised_rows(done: tuple[Found, Path]) -> None:
    _, root = done
    assert len(list((root / "data/train").iterdir())) == 1
    assert not list((root / "trials").glob("*/data"))


@pytest.mark.ray
def test_the_best_job_run_again_gives_the_same_metric(done: tuple[Found, Path], tmp_path: Path) -> None:
    found, root = done
    assert found.best is not None
    best = read_job(root / "best.yaml")
    run = RunDirectory(tmp_path / "again")
    again = work(best, run, prepared(trial_job(best, {}), root), Workers(), lambda: False)
    assert again.metrics["eval_loss"] == found.best.value
