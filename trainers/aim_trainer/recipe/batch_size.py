"""How many rows a micro-batch may have on these devices, where the job says auto."""

from __future__ import annotations

import gc
import json
import logging
import math
from pathlib import Path

import numpy as np
import psutil
import torch

from aim_profile.errors import AimProfileError
from aim_trainer.data.batches import UNTRAINED, Batch
from aim_trainer.data.tokens import Tokens
from aim_trainer.errors import ResourceError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.memory import batch_that_fits, facts_of
from aim_trainer.job.steps import largest_micro_batch

from . import rng
from .loss import summed_loss
from .model import Loaded
from .weights import trained_weights
from .workers import Workers

#: More rows than these make no step cheaper, and without globalBatchSize too few steps.
MOST = 64
#: Where nothing is known of how much a model takes.
_UNKNOWN = 16
_log = logging.getLogger(__name__)


def find(job: FineTuningJob, loaded: Loaded, workers: Workers, rows: Tokens, kept: Path) -> int:
    """Rows of a micro-batch: the job's own, or of auto the most that fit, the same on every worker.

    It begins with what `aim_profile.sizing.training` says and is halved for as long as a step with rows of full length
    does not fit. What was found is kept in the file `kept`: without globalBatchSize it decides what is learned, so a
    run that goes on does not look again. Sharded weights are not tried, as a worker that runs out of memory between
    two gatherings would leave the others waiting. Raises ResourceError where not one row fits.
    """
    asked = job.spec.hyperparameters.batch_size
    if asked != "auto":
        return asked
    if (before := workers.of_first(_read(kept) if workers.first else None)) is not None:
        return int(before)
    length = job.spec.hyperparameters.max_seq_length if job.spec.dataset.packing else int(rows.lengths().max())
    found: int = min(workers.of_all(_estimated(job, loaded, workers, len(rows))))
    while job.spec.distributed.strategy == "ddp" and not all(workers.of_all(fits(loaded, _full(job, found, length)))):
        if found == 1:
            raise ResourceError(
                f"not one row of {length} tokens fits the memory of {loaded.device}",
                field="spec.hyperparameters.batchSize",
                value="auto",
                remedy="lower maxSeqLength, set gradientCheckpointing, or take method qlora or more workers with fsdp2",
            )
        found = largest_micro_batch(job, found // 2)
    _log.info("batchSize auto: %d rows of up to %d tokens", found, length)
    if workers.first:
        kept.write_text(json.dumps({"batchSize": found}))
    return found


def fits(loaded: Loaded, batch: Batch) -> bool:
    """Whether a step can be taken with it, what the optimizer keeps beside it. Nothing is changed but for gradients,
    which are dropped.
    """
    generators, fitted = rng.state(), True
    loaded.model.train()
    try:
        moments = [torch.zeros_like(weight) for weight in trained_weights(loaded.model).values() for _ in range(2)]
        for _ in range(2):  # the second beside the gradients of the first
            summed_loss(loaded.model, loaded, batch)[0].backward()
        del moments
    except (torch.OutOfMemoryError, MemoryError):
        fitted = False
    except RuntimeError as problem:
        if "DefaultCPUAllocator" not in str(problem):
            raise
        fitted = False
    loaded.model.zero_grad(set_to_none=True)
    gc.collect()
    if loaded.device != "cpu":
        torch.cuda.empty_cache()
    rng.restore(generators)
    return fitted


def _estimated(job: FineTuningJob, loaded: Loaded, workers: Workers, rows: int) -> int:
    at_most = min(MOST, math.ceil(rows / workers.world_size))
    try:
        found = batch_that_fits(job, facts_of(job), _memory_bytes(loaded.device, workers))
    except AimProfileError as unknown:
        _log.info("batchSize auto: %s", unknown)
        found = _UNKNOWN
    return largest_micro_batch(job, max(1, min(found, at_most)))


def _memory_bytes(device: str, workers: Workers) -> int:
    """Of a worker's device; of a CPU its share of what is free, and what this process has already."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[1])
    free = psutil.virtual_memory().available // workers.world_size
    return int(free + psutil.Process().memory_info().rss)


def _full(job: FineTuningJob, rows: int, length: int) -> Batch:
    """Rows of full length, all of it trained: no batch takes more."""
    ids = np.ones((rows, length), np.int64)
    positions = np.broadcast_to(np.arange(length), ids.shape).copy()
    labels = ids.copy()
    labels[:, 0] = UNTRAINED
    classes = np.zeros(rows, np.int64) if job.spec.template == "classification" else None
    mask = None if job.spec.dataset.packing else ids
    return Batch(ids, labels, positions, mask, rows * (length - 1), classes)


def _read(kept: Path) -> int | None:
    return int(json.loads(kept.read_bytes())["batchSize"]) if kept.is_file() else None
