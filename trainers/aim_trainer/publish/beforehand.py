"""What a run needs at its end, or along its way, is looked at before its hours of training."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aim_trainer.errors import StoreError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.places.open import open_place

from .destinations.open import open_destination
from .policy import read_policy

#: For a place that is away: told in seconds.
LOOKS_S = 10.0


def check_places(job: FineTuningJob, patience_s: float = LOOKS_S) -> list[str]:
    """The places that the job writes to, each of which can be written to; what is left there counts for nothing.

    Raises StoreError: away, refused, read-only, or no such place; JobError: a policy that is none.
    """
    output, checkpoints = job.spec.output, job.spec.checkpoints.uri
    if output.guardrail_policy is not None:
        read_policy(output.guardrail_policy)
    if checkpoints is not None:
        with _said_of("spec.checkpoints.uri", checkpoints):
            _check(checkpoints, patience_s)
    if output.registry is not None:
        with _said_of("spec.output.registry", output.registry):
            open_destination(output.registry, Path(), patience_s).check()
    return [place for place in (checkpoints, output.registry) if place is not None]


def _check(uri: str, patience_s: float) -> None:
    place, name = open_place(uri, patience_s), f".looked-{uuid.uuid4().hex}"
    place.write_bytes(name, b"looked\n")
    place.remove(name)


@contextmanager
def _said_of(field: str, uri: str) -> Iterator[None]:
    try:
        yield
    except StoreError as problem:
        why = problem.problem if problem.field == field else f"{field}: {problem.problem}"
        raise StoreError(why, field=field, value=uri, remedy=problem.remedy) from problem
