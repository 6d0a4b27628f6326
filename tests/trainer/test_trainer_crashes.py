"""A run that dies at any change it makes to its directory, or whose disk is full, ends as if it had not, once it can.

`SOAK_TRAINER_KILLS=N`: at so many of them, evenly spread (`make soak`).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from aim_trainer.job.job import FineTuningJob
from aim_trainer.metrics.json_lines import read_records
from aim_trainer.metrics.records import Note, Step
from killed_runs import Struck, changes, driven, said
from tiny_models import conversations
from tiny_runs import tiny_job

KILLS = int(os.environ.get("SOAK_TRAINER_KILLS", "2"))


class Left(NamedTuple):
    """What a run left that is done."""

    losses: dict[int, str]
    evaluation: dict[str, Any]
    files: list[str]


class Whole(NamedTuple):
    """changes: how many it made."""

    left: Left
    changes: int
    root: Path


@pytest.fixture(scope="module")
def job(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> FineTuningJob:
    rows = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations(12, 0)))
    raw = tiny_job(tiny("llama"), maxSteps=4, everySteps=2, loraDropout=0.2).model_dump(
        mode="json", by_alias=True, exclude_unset=True
    )
    raw["spec"]["dataset"] |= {"source": str(rows), "validation": {"share": 0.3}}
    raw["spec"] |= {"validation": {"samples": 1, "maxNewTokens": 2}, "output": {"profile": "none"}}
    return FineTuningJob.model_validate(raw)


def left(root: Path, last: str = "done") -> Left:
    """Also that nothing is half there, and exactly one version, which `latest` names. last: what was noted."""
    records = [told.record for told in read_records(root / "metrics.jsonl")]
    steps = [record for record in records if isinstance(record, Step)]
    assert len({step.step for step in steps}) == len(steps)
    assert [record.kind for record in records if isinstance(record, Note)][-1] == last
    assert "<svg" in (root / "report.html").read_text()
    assert not [path for path in root.rglob("*") if ".part" in path.name or "publishing" in path.name]
    (whole,) = (root / "published").glob("v*/COMMIT.json")
    assert (root / "published/latest").read_text() == f"{whole.parent.name}\n"
    files = [path.relative_to(whole.parent).as_posix() for path in whole.parent.rglob("*") if path.is_file()]
    return Left(
        {step.step: step.loss.hex() for step in steps},
        left_evaluation(root),
        sorted(files),
    )


@pytest.fixture(scope="module")
def whole(job: FineTuningJob, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Of a run that nobody disturbs."""
    root = tmp_path_factory.mktemp("whole") / "run"
    assert driven(job, root) == 0
    return Whole(left(root), changes(root), root)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 2 MiB."""
    (disk := tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_costs_no_checkpoint(
    job: FineTuningJob, whole: Whole, small_disk: Path, tmp_path: Path
) -> None:
    checkpoints = job.spec.checkpoints.model_copy(update={"uri": str(small_disk), "every_steps": 1, "keep_last": 50})
    job = job.model_copy(update={"spec": job.spec.model_copy(update={"checkpoints": checkpoints})})
    (ballast := small_disk / "ballast").write_bytes(bytes(1 << 20))
    run = tmp_path / "run"
    assert driven(job, run) == 3
    (told,) = [line for line in said(run).splitlines() if "no space left" in line]
    assert told.startswith(str(small_disk))
    assert told.endswith("free some, or name another place; then resume: what was committed before is as it was")
    newest = max(int(path.parent.name[5:]) for path in small_disk.glob("*/step-*/COMMIT.json"))
    ballast.unlink()
    assert driven(job, run) == 0
    assert f"resumed from step {newest}\n" in said(run)
    assert left(run) == whole.left


def test_a_run_that_dies_at_any_change_ends_as_if_it_had_not(job: FineTuningJob, whole: Whole, tmp_path: Path) -> None:
    wanted, most, _ = whole
    assert most > 50
    apart = max(most // KILLS, 1)
    for at in range(random.Random(time.time_ns()).randint(1, apart), most + 1, apart):
        run = tmp_path / str(at)
        assert driven(job, run, die_at=at) == -9, at
        for version in run.glob("published/v*/COMMIT.json"):
            assert {*json.loads(version.read_bytes())["files"], "COMMIT.json"} == set(wanted.files), at
        assert driven(job, run) == 0, at
        assert left(run) == wanted, at


def test_signals_while_it_saves_and_while_it_publishes(job: FineTuningJob, whole: Whole, tmp_path: Path) -> None:
    """A second one ends at once; what is begun of a version is none, and its number is passed over."""
    run = tmp_path / "run"
    assert driven(job, run, Struck("/checkpoints/", (signal.SIGINT,))) == 143
    assert paused(run) == 1
    assert driven(job, run, Struck("/checkpoints/", (signal.SIGTERM, signal.SIGTERM))) == 143
    assert paused(run) == 1
    assert driven(job, run, Struck("/published/v1/adapter_model", (signal.SIGTERM,))) == 143
    assert paused(run) == 2
    assert not (run / "published/latest").exists()
    assert driven(job, run) == 0
    assert left(run) == whole.left
    assert (run / "published/latest").read_text() == "v2\n"


def paused(root: Path) -> int:
    """How often it said so."""
    records = [told.record for told in read_records(root / "metrics.jsonl")]
    return sum(isinstance(record, Note) and record.kind == "paused" for record in records)


@pytest.mark.parametrize(
    ("verb", "made", "last"), [("publish", "published", "done"), ("evaluate", "evaluation.json", "judged")]
)
def test_a_verb_that_dies_at_any_change_does_its_work_when_it_is_given_again(
    job: FineTuningJob, whole: Whole, tmp_path: Path, verb: Literal["publish", "evaluate"], made: str, last: str
) -> None:
    def done(name: str) -> Path:
        """A run that is, but for what the verb makes."""
        run = shutil.copytree(whole.root, tmp_path / name)
        shutil.rmtree(run / made) if (run / made).is_dir() else (run / made).unlink()
        return run

    run = done("counted")
    assert driven(job, run, verb=verb) == 0
    assert left(run, last) == whole.left
    most = changes(run)
    apart = max(most // (KILLS // 2), 1)
    for at in range(random.Random(time.time_ns()).randint(1, apart), most + 1, apart):
        run = done(str(at))
        assert driven(job, run, at, verb) == -9, at
        assert not (run / "evaluation.json").exists() or left_evaluation(run) == whole.left.evaluation, at
        for version in run.glob("published/v*/COMMIT.json"):
            assert {*json.loads(version.read_bytes())["files"], "COMMIT.json"} == set(whole.left.files), at
        assert driven(job, run, verb=verb) == 0, at
        assert left(run, last) == whole.left, at


def left_evaluation(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "evaluation.json").read_bytes())
    return found
