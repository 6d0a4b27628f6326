"""A job out of its file, refused with file, line, key and remedy."""

from __future__ import annotations

from pathlib import Path

from aim_profile.files.read import check, read_parsed
from aim_trainer.errors import JobError

from .job import FineTuningJob


def read_job(file: Path) -> FineTuningJob:
    """The job. Raises JobError: `job.yaml:9: spec.hyperparameters.learningRat: unknown key; did you mean …`."""
    parsed = read_parsed(file, JobError)
    return check(FineTuningJob, parsed.raw, parsed.named, JobError, parsed.text)
