"""Which trials are still worth their device, and what counts as the best: without Ray."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_trainer.errors import JobError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import read_job
from aim_trainer.run_directory import RunDirectory
from aim_trainer.search.asked import search_of
from aim_trainer.search.cost import Curve, gain_per_hour
from aim_trainer.search.results import Trial, found_of, write_results

JOB = """
apiVersion: aim.amd.com/v1alpha1
kind: FineTuningJob
metadata: {name: bot}
spec:
  baseModel: {modelId: org/model}
  dataset: {source: rows.jsonl}
  search:
    objective: {metric: eval_loss, direction: minimize}
    parameters:
    - {name: hyperparameters.learningRate, searchSpace: {logUniform: {min: 1.0e-5, max: 1.0e-2}}}
"""


def curve(*points: tuple[float, float], hours: float = 1.0) -> Curve:
    made = Curve()
    for share, value in points:
        made.add(share, value, share * hours)
    return made


def test_a_trial_gains_what_it_is_expected_to_end_below_the_best() -> None:
    """Half way the finished one was at 2.0 and ended at 1.0: half of what it was. So 1.6 is expected to end at 0.8."""
    others = {"a": curve((0.5, 2.0), (1.0, 1.0))}
    running = curve((0.5, 1.6))
    assert gain_per_hour(running, others, minimize=True) == pytest.approx((1.0 - 0.8) / 0.5)


def test_a_trial_that_will_not_beat_the_best_gains_nothing() -> None:
    others = {"a": curve((0.5, 2.0), (1.0, 1.0)), "b": curve((0.5, 3.0))}  # b is not over: it says nothing
    assert gain_per_hour(curve((0.5, 2.4)), others, minimize=True) == 0
    assert gain_per_hour(curve((0.5, float("nan"))), others, minimize=True) == 0
    accuracy = {"a": curve((0.5, 0.4), (1.0, 0.8))}
    assert gain_per_hour(curve((0.5, 0.3)), accuracy, minimize=False) == 0
    assert gain_per_hour(curve((0.5, 0.45)), accuracy, minimize=False) == pytest.approx(0.1 / 0.5)


def test_nothing_is_expected_before_one_trial_has_ended() -> None:
    assert gain_per_hour(curve((0.5, 1.0)), {"a": curve((0.9, 1.0))}, minimize=True) is None
    assert gain_per_hour(curve((1.0, 1.0)), {"a": curve((1.0, 1.0))}, minimize=True) is None
    assert gain_per_hour(Curve(), {"a": curve((1.0, 1.0))}, minimize=True) is None


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.floats(0.01, 100), st.floats(0.01, 0.99))
def test_a_gain_is_never_negative_and_less_for_a_worse_trial(ends: list[float], value: float, share: float) -> None:
    others = {str(at): curve((share, 2 * end), (1.0, end)) for at, end in enumerate(ends)}
    better = gain_per_hour(curve((share, value)), others, minimize=True)
    worse = gain_per_hour(curve((share, value * 1.5)), others, minimize=True)
    assert better is not None
    assert worse is not None
    assert 0 <= worse <= better


@pytest.fixture
def job(tmp_path: Path) -> FineTuningJob:
    (tmp_path / "job.yaml").write_text(JOB)
    return read_job(tmp_path / "job.yaml")


def trial(name: str, rate: float, end: str, value: float | None) -> Trial:
    return Trial(name, {"hyperparameters.learningRate": rate}, end, value, 10, 0.5)  # type: ignore[arg-type]


def test_the_best_is_one_that_came_to_its_end(job: FineTuningJob, tmp_path: Path) -> None:
    trials = [
        *(trial("t1", 1e-3, "finished", 2.0), trial("t2", 2e-3, "stopped", 0.5), trial("t3", 3e-3, "failed", None)),
        *(trial("t4", 4e-3, "finished", 1.5), trial("t5", 5e-3, "finished", float("nan"))),
    ]
    found = found_of(job, trials)
    assert [each.name for each in found.trials] == ["t2", "t4", "t1", "t3", "t5"]
    assert found.best is not None
    assert found.best.name == "t4"
    write_results(job, tmp_path, found)
    best = read_job(tmp_path / "best.yaml")
    assert best.spec.hyperparameters.learning_rate == 4e-3
    assert best.spec.search is None
    assert json.loads((tmp_path / "results.json").read_text())["best"] == "t4"
    with (tmp_path / "results.csv").open() as opened:
        table = list(csv.DictReader(opened))
    assert [row["trial"] for row in table] == ["t2", "t4", "t1", "t3", "t5"]
    assert table[1]["hyperparameters.learningRate"] == "0.004"
    assert "t4: learningRate 0.004 (finished)" in (tmp_path / "search.svg").read_text()


def test_without_an_end_there_is_no_best(job: FineTuningJob, tmp_path: Path) -> None:
    found = found_of(job, [trial("t1", 1e-3, "failed", None), trial("t2", 1e-3, "stopped", 1.0)])
    assert found.best is None
    write_results(job, tmp_path, found)
    assert not (tmp_path / "best.yaml").exists()


@pytest.mark.parametrize(
    ("name", "space", "why"),
    [
        (
            "hyperparameters.learningRat",
            "{uniform: {min: 0.1, max: 0.2}}",
            "there is no such field; did you mean learningRate",
        ),
        ("learningRate", "{uniform: {min: 0.1, max: 0.2}}", "no such field; the keys here are baseModel, method"),
        ("hyperparameters.learningRate", "{uniform: {min: 0.1, max: 2}}", "less than or equal to 1"),
        ("hyperparameters.loraRank", "{uniform: {min: 0, max: 8}}", "greater than or equal to 1"),
        ("hyperparameters.schedule", "{uniform: {min: 1, max: 8}}", "'cosine', 'linear' or 'constant'"),
        ("dataset", "{uniform: {min: 1, max: 8}}", "dataset"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_starts(
    tmp_path: Path, name: str, space: str, why: str
) -> None:
    text = JOB.replace("{logUniform: {min: 1.0e-5, max: 1.0e-2}}", space).replace("hyperparameters.learningRate", name)
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(JobError, match=why):
        read_job(tmp_path / "job.yaml")


def test_a_batch_that_the_device_decides_is_refused(job: FineTuningJob, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="make trainer")
    from aim_trainer.search.search import search

    with pytest.raises(JobError, match=r"batchSize: auto, .*set globalBatchSize"):
        search(job, RunDirectory(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_job_without_a_search_says_how_to_write_one(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB.partition("  search:")[0])
    with pytest.raises(JobError, match=r"spec.search: the job has none; name parameters"):
        search_of(read_job(tmp_path / "job.yaml"))
