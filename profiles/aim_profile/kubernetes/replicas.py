"""One replica of a plan: the card it stands on, and the profile it is started with there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from aim_profile.gpus.catalog import PartitionMode, by_name
from aim_profile.models.facts import Precision
from aim_profile.models.load import load_model
from aim_profile.plans.plan import CardPlan, Placement
from aim_profile.plans.workload import Workload
from aim_profile.serving.derive import Refusal, Wanted, derive
from aim_profile.serving.profile import FineTuning, Profile
from aim_profile.sizing.kv_cache import KvDtype
from aim_profile.units import GIB

from .target import RenderError


def is_service(placement: Placement) -> bool:
    """Whether it serves a model."""
    return placement.kind == "serve" and placement.model is not None


def card_of(cards: Mapping[tuple[str, int], CardPlan], placement: Placement) -> CardPlan:
    """The plan's card under it, of cards by (node, index). Raises RenderError."""
    found = cards.get((placement.node, placement.cards[0]))
    if found is None:
        raise RenderError(
            f"{placement.id} stands on {placement.node} card {placement.cards[0]}, which the plan does not list",
            field="placements",
            value=placement.id,
            remedy="plan again",
        )
    return found


def mode_of(placement: Placement, card: CardPlan) -> PartitionMode:
    """The mode of the very devices the plan gave it."""
    deployment = "bare-metal" if card.deployment == "unknown" else card.deployment
    mode = by_name(card.gpu).mode(placement.mode, deployment)
    return mode.model_copy(update={"memory_mib": card.device_memory_mib or mode.memory_mib, "tier": card.tier})


def wanted_of(placement: Placement, workload: Workload | None) -> Wanted:
    """What the plan sized it for. workload: for what a plan does not repeat (KV cache type, LoRA slots).

    Raises RenderError for a fallback that the workload does not name.
    """
    workload = _as_placed(placement, workload)
    kv_dtype: KvDtype = workload.kv_dtype if workload else "auto"
    slots = workload.lora_slots if workload else 0
    limit = placement.memory_limit_gib
    return Wanted(
        precision=_precision(placement),
        metric=placement.slo,
        context=placement.context,
        tensor_parallel=placement.tp,
        kv_dtype=kv_dtype,
        qos_priority=placement.priority,
        # A plan rounds to a thousandth of a GiB: what is less is too little, not no limit.
        memory_limit_bytes=None if limit is None else max(1, int(limit * GIB)),
        finetuning=FineTuning(lora_slots=slots, lora_rank=workload.lora_rank) if workload and slots else None,
    )


def _as_placed(placement: Placement, workload: Workload | None) -> Workload | None:
    """The workload in the fallback that the plan placed it in."""
    if workload is None or not placement.fallback:
        return workload
    if placement.fallback > len(workload.fallback):
        raise RenderError(
            f"{placement.id}: placed in fallback {placement.fallback}, the workload names {len(workload.fallback)}",
            field="fallback",
            value=placement.fallback,
            remedy="give the workloads file that the plan was made from, or plan again",
        )
    return workload.forms[placement.fallback - 1]


def profile_of(placement: Placement, mode: PartitionMode, wanted: Wanted) -> Profile:
    """The profile of a replica on the very devices the plan gave it."""
    found = derive(load_model(placement.model or ""), mode, wanted)
    if isinstance(found, Refusal):
        raise RenderError(
            f"{placement.id}: {found.reason}",
            field="placements",
            value=placement.id,
            remedy="give the workloads file too, if it names a KV cache type; else plan again",
        )
    return found


def _precision(placement: Placement) -> Precision | None:
    found = next((known for known in get_args(Precision) if known == placement.precision), None)
    if found is None and placement.precision is not None:
        raise RenderError(
            f"{placement.id}: precision {placement.precision} is not served",
            field="precision",
            value=placement.precision,
            remedy=f"it is one of {', '.join(get_args(Precision))}",
        )
    return found
