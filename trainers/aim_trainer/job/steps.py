"""How many rows make a step, and how many steps a run."""

from __future__ import annotations

import math
from typing import NamedTuple

from aim_trainer.errors import JobError

from .job import FineTuningJob


class Arithmetic(NamedTuple):
    """micro_batch: rows of one forward pass of one worker; accumulation: passes of each worker in an optimizer step;
    global_batch: rows of an optimizer step, micro_batch × accumulation × workers; steps: optimizer steps of the run.
    """

    micro_batch: int
    accumulation: int
    global_batch: int
    steps_per_epoch: int
    steps: int


def batches(job: FineTuningJob, rows: int, micro_batch: int | None = None) -> Arithmetic:
    """Of so many training rows (packed: sequences) an epoch. micro_batch: what was found where batchSize is auto.

    The last step of an epoch has the rows that are left. Raises JobError with the arithmetic where it does not divide.
    """
    if rows < 1:
        raise JobError("no rows to train on", field="spec.dataset", value=rows, remedy="give it some")
    hyper, workers = job.spec.hyperparameters, job.spec.distributed.workers
    micro = hyper.batch_size if hyper.batch_size != "auto" else micro_batch
    if micro is None:
        raise JobError("spec.hyperparameters.batchSize: auto, and none was found yet", field="batchSize", value="auto")
    at_once = micro * workers
    whole = hyper.global_batch_size or at_once
    if whole % at_once:
        raise JobError(
            f"spec.hyperparameters.globalBatchSize: {whole} rows a step do not divide by "
            f"{micro} rows × {workers} workers = {at_once}",
            field="spec.hyperparameters.globalBatchSize",
            value=whole,
            remedy=f"write {max(whole // at_once, 1) * at_once}, or another batchSize or number of workers",
        )
    per_epoch = math.ceil(rows / whole)
    steps = hyper.max_steps or max(math.ceil(hyper.epochs * per_epoch), 1)
    _refuse_long_warmup(hyper.warmup, steps)
    return Arithmetic(micro, whole // at_once, whole, per_epoch, steps)


def _refuse_long_warmup(warmup: float, steps: int) -> None:
    if warmup >= max(steps, 1) and warmup >= 1:
        raise JobError(
            f"spec.hyperparameters.warmup: {warmup:g} steps, and the run has {steps}: none is left",
            field="spec.hyperparameters.warmup",
            value=warmup,
            remedy="write fewer, or a share below 1",
        )


def largest_micro_batch(job: FineTuningJob, at_most: int) -> int:
    """The largest number of rows, not above `at_most`, with which globalBatchSize divides over the workers."""
    whole, workers = job.spec.hyperparameters.global_batch_size, job.spec.distributed.workers
    if whole is None:
        return max(at_most, 1)
    share = whole // workers
    return next(rows for rows in range(max(min(at_most, share), 1), 0, -1) if share % rows == 0)


def warmup_steps(job: FineTuningJob, steps: int) -> int:
    """Steps in which the learning rate rises: as many as `warmup` says, or that share of all of them, rounded up.

    Never all of them: the first has a rate of 0, as transformers' and torchtune's, so that a run of one step would
    train nothing.
    """
    warmup = job.spec.hyperparameters.warmup
    return min(int(warmup) if warmup >= 1 else math.ceil(warmup * steps), max(steps - 1, 0))
