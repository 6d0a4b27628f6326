"""The processes of a run, and the few things they tell each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among all of a run. device: `cpu` or `cuda:0`, where its model is. Where there are several, the
    caller has made the process group (gloo, nccl).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Each value summed over all workers, in float64, the same on every one."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def of_all(self, value: Any) -> list[Any]:
        """What each worker says, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        said: list[Any] = [None] * self.world_size
        dist.all_gather_object(said, value)
        return said

    def of_first(self, value: Any) -> Any:
        """What the first says; what others say is not heard."""
        if self.world_size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What the first one does in here alone, all wait for; fails it there, it fails everywhere, with its words."""
        problem: Exception | None = None
        try:
            yield
        except Exception as failed:  # noqa: BLE001 - told to the others, which wait, then raised as it was
            problem = failed
        told = self.of_first(problem if problem is None or self.first else None)
        if problem or told:
            raise problem or told
