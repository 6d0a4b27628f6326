"""Trials on a tiny model, under Ray Tune: one fails, one is stopped early, and the best one run again is as good."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aim_trainer.errors import StoreError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import as_yaml, read_job
from aim_trainer.recipe.workers import Workers
from aim_trainer.run_directory import RunDirectory
from aim_trainer.search.results import Found
from aim_trainer.search.search import search
from aim_trainer.search.trial import Given, prepared, run_trial, trial_job
from aim_trainer.worker import work
from killed_runs import search_that_dies
from ray_session import Cluster
from tiny_models import conversations, tokenizer
from tiny_runs import tiny_job

RATE, LENGTH = "hyperparameters.learningRate", "hyperparameters.maxSeqLength"


def searching(model: Path, rows: Path, **changed: Any) -> FineTuningJob:
    raw = tiny_job(model, "full", maxSteps=10).model_dump(mode="json", by_alias=True, exclude_unset=True)
    raw["spec"]["dataset"] |= {"source": str(rows), "validation": {"share": 0.3}}
    raw["spec"]["validation"] = {"everySteps": 2}
    parameters = [
        {"name": RATE, "searchSpace": {"categorical": [3e-3, 1e-6]}},
        {"name": LENGTH, "searchSpace": {"categorical": [128, 8]}},  # no row has so few tokens as 8
    ]
    raw["spec"]["search"] = {"numTrials": 4, "parameters": parameters, **changed}
    return FineTuningJob.model_validate(raw)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations(40)))
    return file


@pytest.fixture(scope="module")
def done(
    tiny: Callable[[str], Path], rows: Path, ray_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Found, Path]]:
    """Four trials, one after the other; by this seed a good rate twice, a bad one, and a length that fits no row. The
    search is killed after the first, and goes on.
    """
    import ray

    root = tmp_path_factory.mktemp("search") / "found"
    job = searching(tiny("llama"), rows, algorithm="random", seed=4)
    # A Ray of this process's own has left another mode.
    given = {"RAY_ADDRESS": ray_cluster.address, "RAY_AUTH_MODE": "disabled"}
    assert search_that_dies(job, root, given, at=2) == -9
    kept = "".join(state.read_text() for state in root.glob("ray/tune/experiment_state-*.json"))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in given.items():
            environment.setenv(name, value)
        found = search(job, RunDirectory(root))
        assert any(trial.name in kept for trial in found.trials)  # it was gone on with, not begun anew
        yield found, root
        ray.shutdown()


@pytest.mark.ray
def test_of_four_trials_one_is_stopped_early_and_failures_stop_no_other(done: tuple[Found, Path]) -> None:
    found, root = done
    assert [trial.end for trial in found.trials] == ["finished", "finished", "stopped", "failed"]
    best, as_good, stopped, failed = found.trials
    assert found.best == best
    assert (best.values[RATE], stopped.values[RATE], failed.values[LENGTH]) == (3e-3, 1e-6, 8)
    assert (best.step, stopped.step, failed.step) == (10, 2, 0)
    assert (as_good.values, as_good.value) == (best.values, best.value)
    assert "hyperparameters.maxSeqLength is 8; raise it" in failed.why
    with (root / "results.csv").open() as opened:
        assert [row["trial"] for row in csv.DictReader(opened)] == [trial.name for trial in found.trials]
    assert (root / "search.svg").is_file()


def test_a_directory_of_another_search_is_refused(tiny: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    job, other = (searching(tiny("llama"), rows, numTrials=number) for number in (3, 4))
    kept = RunDirectory(tmp_path)
    kept.job.write_text(as_yaml(other))
    with pytest.raises(StoreError, match=r"holds a search, or a run, of another job; name another directory$"):
        search(job, kept)
    assert read_job(kept.job) == other
    (tmp_path / "results.json").touch()
    with pytest.raises(StoreError, match=r"holds a search that is done; name another directory$"):
        search(other, kept)


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


@pytest.mark.parametrize(
    ("packing", "weight", "epochs"), [(True, 1.0, 20), (False, 0.5, 5)], ids=["packed", "weighted"]
)
def test_a_trial_is_measured_ten_times_however_its_rows_make_steps(
    tiny: Callable[[str], Path], rows: Path, tmp_path: Path, packing: bool, weight: float, epochs: int
) -> None:
    """Not as many steps as its rows would make, each seen once in an epoch in a sequence of its own. Without Ray."""
    raw = searching(tiny("llama"), rows).model_dump(mode="json", by_alias=True, exclude_unset=True)
    raw["spec"]["dataset"] |= {"source": None, "sources": [{"uri": str(rows), "weight": weight}], "packing": packing}
    raw["spec"]["hyperparameters"] |= {"maxSteps": None, "epochs": epochs, "maxSeqLength": 512}
    raw["spec"]["search"]["parameters"].pop()
    raw["spec"] |= {"validation": {}}
    job, told = FineTuningJob.model_validate(raw), list[dict[str, Any]]()
    tokenizer().save_pretrained(RunDirectory(tmp_path).tokenizer)
    run_trial(Given(job, tmp_path, str(tmp_path)), "one", {}, told.append)
    steps = told[-1]["step"]
    every = -(-steps // 10)
    assert [each["step"] for each in told] == [*range(every, steps, every), steps]
    assert len(told) > 5
    assert told[-1]["percent"] == 100
    hours = [each["gpu_hours"] for each in told]
    assert hours == sorted(set(hours))
