"""A model over several workers: a copy on each (DDP), or a part of each weight on each (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from aim_trainer.errors import JobError
from aim_trainer.job.job import FineTuningJob

from .model import Loaded
from .workers import Workers


@dataclass(frozen=True, slots=True)
class Placed:
    """forward: what is called instead of the model. accumulating: of every micro-batch of a step but the last."""

    forward: Any
    accumulating: Callable[[], AbstractContextManager[None]] = nullcontext


def place(job: FineTuningJob, loaded: Loaded, workers: Workers) -> Placed:
    """Before an optimizer is made: sharding puts other weights in the place of the model's.

    Gradients are means over the workers. Raises JobError for a strategy that this job cannot have.
    """
    if job.spec.distributed.strategy == "fsdp2":
        return _sharded(job, loaded, workers)
    if workers.world_size == 1:
        return Placed(loaded.model)
    devices = None if workers.device == "cpu" else [torch.device(workers.device)]
    copied = DistributedDataParallel(loaded.model, device_ids=devices, gradient_as_bucket_view=True)
    return Placed(copied, copied.no_sync)


def _sharded(job: FineTuningJob, loaded: Loaded, workers: Workers) -> Placed:
    """Each layer is gathered when it is computed, and let go. Gradients are reduced with every micro-batch: kept whole
    until the last one, they would take the memory that sharding saves.
    """
    if workers.world_size == 1:
        raise _refused("fsdp2", "shards over workers, and this run has one", "set ddp, or distributed.workers")
    if job.spec.method == "qlora":
        raise _refused("fsdp2", "does not shard quantised weights", "set ddp, or method: lora")
    mesh = init_device_mesh(workers.device.partition(":")[0], (workers.world_size,))
    mixed = MixedPrecisionPolicy()
    if loaded.compute != torch.float32:
        mixed = MixedPrecisionPolicy(param_dtype=loaded.compute, reduce_dtype=torch.float32)
    for layer in layers(loaded.model):
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(loaded.model, mesh=mesh, mp_policy=mixed)
    whole = [name for name, weight in loaded.model.named_parameters() if not isinstance(weight, DTensor)]
    if whole or not isinstance(loaded.model, FSDPModule):
        raise RuntimeError(f"asked to shard, {type(loaded.model).__name__} still has whole weights: {whole[:3]}")
    return Placed(loaded.model)


def layers(model: Any) -> list[torch.nn.Module]:
    """The decoder's layers, by the class that transformers says must stay in one piece."""
    kept = set(model._no_split_modules)
    return [module for module in model.modules() if type(module).__name__ in kept]


def _refused(strategy: str, why: str, remedy: str) -> JobError:
    field = "spec.distributed.strategy"
    return JobError(f"{field}: {strategy} {why}", field=field, value=strategy, remedy=remedy)
