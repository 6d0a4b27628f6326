"""What would make a job fit a device that is too small for it: each tried, none guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from aim_profile.models.facts import ModelFacts
from aim_trainer.errors import JobError

from .job import FineTuningJob
from .memory import batch_that_fits
from .override import with_parameters

Change = Mapping[str, int | float | str | bool]
_WORKERS = (2, 4, 8, 16, 32)


def remedies(job: FineTuningJob, facts: ModelFacts, device_bytes: int) -> list[str]:
    """Changes, each by itself, with which one row or more of a pass fits; the mildest first. Empty: none does."""
    found = [_said(change) for change in _mild(job) if _fits(job, facts, device_bytes, change)]
    sharded = next((change for change in _sharded(job) if _fits(job, facts, device_bytes, change)), None)
    return found + ([_said(sharded)] if sharded else [])


def _mild(job: FineTuningJob) -> Iterator[Change]:
    hyper = job.spec.hyperparameters
    if not hyper.gradient_checkpointing:
        yield {"hyperparameters.gradientCheckpointing": True}
    if hyper.batch_size not in ("auto", 1):
        yield {"hyperparameters.batchSize": 1}
    if not hyper.gradient_checkpointing and hyper.batch_size not in ("auto", 1):
        yield {"hyperparameters.batchSize": 1, "hyperparameters.gradientCheckpointing": True}
    if job.spec.method == "full":
        yield {"method": "lora"}
    if job.spec.method != "qlora":
        yield {"method": "qlora"}


def _sharded(job: FineTuningJob) -> Iterator[Change]:
    for workers in _WORKERS:
        if workers > job.spec.distributed.workers or job.spec.distributed.strategy == "ddp":
            yield {"distributed.workers": workers, "distributed.strategy": "fsdp2"}


def _fits(job: FineTuningJob, facts: ModelFacts, device_bytes: int, change: Change) -> bool:
    try:
        return batch_that_fits(with_parameters(job, change), facts, device_bytes) > 0
    except JobError:  # two fields that cannot be together, as globalBatchSize and that many workers
        return False


def _said(change: Change) -> str:
    values = (f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in change.items())
    return " ".join(f"--set spec.{value}" for value in values)
