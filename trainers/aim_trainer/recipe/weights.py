"""Weights by name, whole or sharded: gathered from all workers and given back to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """What the optimizer changes, by name; what is tied stands once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def let_go(model: Any) -> None:
    """Of a sharded model: what was gathered to compute, and no backward pass let go of. Until then the model shows
    weights that are not those the optimizer changes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(weights: Mapping[str, torch.Tensor], *, kept: bool) -> dict[str, torch.Tensor]:
    """Each on the CPU, whole; what is there and whole is not copied. Where they are sharded all workers call it, and
    those that keep nothing never hold more than one.
    """
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if kept:
            found[name] = whole.detach().to("cpu").contiguous()
    return found


def fill(target: torch.Tensor, first_has: torch.Tensor | None) -> None:
    """Gives `target` the values the first worker has, which others need not know: they pass None."""
    source = torch.empty(target.shape, dtype=target.dtype) if first_has is None else first_has.to(target.dtype)
    source = source.to(target.device)
    with torch.no_grad():
        if isinstance(target, DTensor):
            part = distribute_tensor(source, target.device_mesh, target.placements)
            target.to_local().copy_(part.to_local())
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(source, src=0)
        target.copy_(source)
