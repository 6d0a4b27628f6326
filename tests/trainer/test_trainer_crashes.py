"""A run that dies at any change it makes to its directory, or whose disk is full, ends as if it had not, once it can.

`SOAK_TRAINER_KILLS=N`: at so many of them, evenly spread (`make soak`).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aim_trainer.job.job import FineTuningJob
from aim_trainer.metrics.json_lines import read_records
from aim_trainer.metrics.records import Note, Step
from killed_runs import changes, driven, said
from tiny_models import conversations
from tiny_runs import tiny_job

KILLS = int(os.environ.get("SOAK_TRAINER_KILLS", "2"))


class Left(NamedTuple):
    """What a run left that is done."""

    losses: dict[int, str]
    evaluation: dict[str, Any]
    files: list[str]


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


def left(root: Path) -> Left:
    """Also that nothing is half there, and exactly one version, which `latest` names."""
    records = [told.record for told in read_records(root / "metrics.jsonl")]
    steps = [record for record in records if isinstance(record, Step)]
    assert len({step.step for step in steps}) == len(steps)
    assert [record.kind for record in records if isinstance(record, Note)][-1] == "done"
    assert "<svg" in (root / "report.html").read_text()
    assert not [path for path in root.rglob("*") if ".part" in path.name or "publishing" in path.name]
    (whole,) = (root / "published").glob("v*/COMMIT.json")
    assert (root / "published/latest").read_text() == f"{whole.parent.name}\n"
    files = [path.relative_to(whole.parent).as_posix() for path in whole.parent.rglob("*") if path.is_file()]
    return Left(
        {step.step: step.loss.hex() for step in steps},
        json.loads((root / "evaluation.json").read_bytes()),
        sorted(files),
    )


@pytest.fixture(scope="module")
def whole(job: FineTuningJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[Left, int]:
    """Of a run that nobody disturbs, and how many changes it made."""
    root = tmp_path_factory.mktemp("whole") / "run"
    assert driven(job, root) == 0
    return left(root), changes(root)


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
    job: FineTuningJob, whole: tuple[Left, int], small_disk: Path, tmp_path: Path
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
    assert left(run) == whole[0]


def test_a_run_that_dies_at_any_change_ends_as_if_it_had_not(
    job: FineTuningJob, whole: tuple[Left, int], tmp_path: Path
) -> None:
    wanted, most = whole
    assert most > 50
    apart = max(most // KILLS, 1)
    for at in range(random.Random(time.time_ns()).randint(1, apart), most + 1, apart):
        run = tmp_path / str(at)
        assert driven(job, run, die_at=at) == -9, at
        for version in run.glob("published/v*/COMMIT.json"):
            assert {*json.loads(version.read_bytes())["files"], "COMMIT.json"} == set(wanted.files), at
        assert driven(job, run) == 0, at
        assert left(run) == wanted, at
