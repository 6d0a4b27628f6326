"""`aim-trainer run`, `aim-trainer resume` and `aim-trainer pause`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from aim_trainer import stopping
from aim_trainer.errors import StoreError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import read_job
from aim_trainer.run_directory import RunDirectory


def run(file: Path, overrides: Sequence[str], directory: Path | None, ray: bool | None) -> int:
    """Begins the run of a job, or goes on with it. Returns what the process ends with. Raises TrainerError."""
    job = read_job(file, overrides)
    return _run(job, directory or Path("runs", job.metadata.name), ray)


def resume(directory: Path, overrides: Sequence[str], ray: bool | None) -> int:
    """Goes on with the run in a directory, by the job it keeps. Raises TrainerError."""
    job = RunDirectory(directory).job
    if not job.is_file():
        raise StoreError(
            f"{directory}: no run is there", field="run", value=str(directory), remedy="begin one: aim-trainer run JOB"
        )
    return _run(read_job(job, overrides), directory, ray)


def pause(directory: Path, patience_s: float) -> str:
    """What came of it, for people. Raises StoreError."""
    if stopping.pause(RunDirectory(directory), patience_s):
        return f"{directory}: paused; aim-trainer resume {directory} goes on"
    return f"{directory}: no process is at this run"


def _run(job: FineTuningJob, directory: Path, ray: bool | None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from aim_trainer import run

    return run.run(job, RunDirectory(directory.absolute()), ray=_wants_ray(job) if ray is None else ray)


def _wants_ray(job: FineTuningJob) -> bool:
    """Where it is of use: there are several workers, or a cluster."""
    return job.spec.distributed.workers > 1 or "RAY_ADDRESS" in os.environ
