"""A job out of its file, refused with file, line, key and remedy; and back into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aim_profile.files.read import check, read_parsed
from aim_profile.files.write import dump
from aim_trainer.errors import JobError

from .job import FineTuningJob
from .override import Override, parse_override, with_value


def read_job(file: Path, overrides: Sequence[str] = ()) -> FineTuningJob:
    """The job, with `spec.hyperparameters.seed=7` and the like set in it.

    Raises JobError: `job.yaml:9: spec.hyperparameters.learningRat: unknown key; did you mean …`.
    """
    parsed = read_parsed(file, JobError)
    asked = [parse_override(text) for text in overrides]
    raw = parsed.raw
    for one in asked:
        raw = _overridden(raw, one)
    try:
        return check(FineTuningJob, raw, parsed.named, JobError, parsed.text)
    except JobError as problem:
        raise _told_of_override(problem, asked) from problem


def as_yaml(job: FineTuningJob) -> str:
    """The job as a person would write it: what was given, no defaults. Reading it gives the same job."""
    return dump(job.model_dump(by_alias=True, exclude_unset=True, mode="json"))


def _overridden(raw: Any, one: Override) -> Any:
    try:
        return with_value(raw, one.place, one.value)
    except LookupError as problem:
        why = f"--set {one.written}: the job has nothing to set it in at {problem.args[0]}"
        raise JobError(why, field="set", value=one.written) from problem


def _told_of_override(problem: JobError, asked: Sequence[Override]) -> JobError:
    """What an override is to blame for has no line in the file."""
    for one in asked:
        path = one.written.partition("=")[0]
        if problem.field == path or problem.field.startswith((f"{path}.", f"{path}[")):
            inside, why = problem.field.removeprefix(path), problem.problem.partition(f"{problem.field}: ")[2]
            told = f"{inside.lstrip('.')}: {why}" if inside else why
            return JobError(f"--set {one.written}: {told}", field=problem.field, value=problem.value)
    return problem
