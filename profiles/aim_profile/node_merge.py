"""Saved amd-smi output joined to what sysfs and KFD said: it fills blanks and never overrides a reading."""

from __future__ import annotations

from typing import Any

from .errors import NodeError
from .node_facts import Card, DriverCaps, Partition

_FILLED = ("compute_partition", "memory_partition", "alloc_mode", "numa_node", "hive_id", "gfx", "vram_mib")


def merge_cards(cards: tuple[Card, ...], saved: tuple[Card, ...]) -> tuple[Card, ...]:
    """Each card with its saved twin: by PCI address where both have one, else by order.

    Raises NodeError where the saved output cannot be of this node.
    """
    if not cards:
        return saved
    by_bdf: dict[str | None, Card] = {card.bdf: card for card in saved if card.bdf}
    if not by_bdf and len(saved) > len(cards):
        raise NodeError(
            f"amd-smi names {len(saved)} cards, this node has {len(cards)}",
            field="amd_smi",
            value=len(saved),
            remedy="give output saved on the same node at the same time",
        )
    by_order = dict(enumerate(saved)) if not by_bdf else {}
    twins = (by_bdf.get(card.bdf) or by_order.get(place) for place, card in enumerate(cards))
    return tuple(_joined(card, twin) if twin else card for card, twin in zip(cards, twins, strict=True))


def _joined(card: Card, twin: Card) -> Card:
    update: dict[str, Any] = {
        name: getattr(twin, name) for name in _FILLED if getattr(card, name) is None and getattr(twin, name) is not None
    }
    if twin.caps is not None:
        own = card.caps or DriverCaps()
        update["caps"] = DriverCaps(
            compute=twin.caps.compute or own.compute,
            memory=twin.caps.memory or own.memory,
            combinations=twin.caps.combinations or own.combinations,
        )
    measured = {p.index: p.memory_mib for p in twin.partitions if p.memory_source == "measured"}
    update["partitions"] = tuple(_measured(partition, measured) for partition in card.partitions)
    notes = [note for note in twin.notes if "N/A" in note]
    if card.compute_partition and twin.compute_partition not in (None, card.compute_partition):
        notes.append(f"amd-smi says {twin.compute_partition}, the tree says {card.compute_partition}")
    return card.model_copy(update={**update, "notes": (*card.notes, *notes)})


def _measured(partition: Partition, measured: dict[int, int | None]) -> Partition:
    memory_mib = measured.get(partition.index)
    if partition.memory_source == "measured" or memory_mib is None:
        return partition
    return partition.model_copy(update={"memory_mib": memory_mib, "memory_source": "measured"})
