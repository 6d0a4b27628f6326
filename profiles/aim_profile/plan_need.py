"""What a replica needs: over how many devices it may stand, and how many bytes it takes of each."""

from __future__ import annotations

from collections import Counter

from .errors import SizingError
from .facts import ModelFacts
from .fleet import Fleet
from .plan_problem import DeviceKind, Option
from .sizing import Request, demand
from .units import parse_memory
from .workload import Workload


def need_bytes(workload: Workload, devices: int, facts: ModelFacts | None) -> int | None:
    """Bytes a replica over that many devices needs on each; None where the model cannot be split so.

    Raises SizingError for unknown facts or an impossible request.
    """
    if workload.memory is not None or facts is None:
        return parse_memory(workload.memory or "")
    try:
        return demand(facts, request_of(workload, devices)).total
    except SizingError as problem:
        if problem.field == "tp" and devices > 1 and workload.tp is None:
            return None
        raise


def request_of(workload: Workload, devices: int) -> Request:
    """What is asked of the model, over that many devices."""
    return Request(
        precision=workload.precision,
        context=workload.context,
        concurrency=workload.concurrency,
        tp=devices,
        kv_dtype=workload.kv_dtype,
        lora_slots=workload.lora_slots,
        lora_rank=workload.lora_rank,
    )


def most_whole_cards(fleet: Fleet) -> dict[str, int]:
    """For each accelerator the most cards of one hive of one node: what tensor parallelism may span."""
    most: dict[str, int] = {}
    for gpu, cards in {(node.gpu, id(node.cards)): (node.gpu, node.cards) for node in fleet.nodes}.values():
        hives = Counter(card.hive for card in cards)
        most[gpu] = max(most.get(gpu, 0), *hives.values())
    return most


def device_counts(workload: Workload, kind: DeviceKind, most_cards: int) -> tuple[int, ...]:
    """Devices a replica may span: siblings that divide a card evenly, or 1, 2, 4 … whole cards."""
    if workload.tp is not None:
        most = most_cards if kind.whole else kind.partitions
        latency_over_siblings = workload.slo == "latency" and not kind.whole and workload.tp > 1
        return (workload.tp,) if workload.tp <= most and not latency_over_siblings else ()
    pinned_device = workload.pinned is not None and workload.pinned.partition is not None
    pinned_card = workload.pinned is not None and workload.pinned.card is not None
    if workload.memory is not None or workload.memory_limit is not None or pinned_device:
        return (1,)
    if kind.whole:
        return (1,) if pinned_card else tuple(n for n in (1, 2, 4, 8, 16) if n <= most_cards)
    if workload.slo == "latency":
        return (1,)
    return tuple(n for n in range(1, kind.partitions + 1) if kind.partitions % n == 0)


def cards_taken(option: Option, kind: DeviceKind) -> float:
    """The share of a card (or the number of cards) a replica takes."""
    return option.devices / kind.partitions
