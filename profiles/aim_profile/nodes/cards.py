"""From what KFD and sysfs say to a Card: catalogue facts joined, modes derived only where they follow.

Saved amd-smi output joins last: it fills blanks and never overrides a reading.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from aim_profile.errors import NodeError
from aim_profile.gpus.catalog import (
    COMPUTE_MODES,
    Accelerator,
    Compute,
    Memory,
    Unknown,
    by_pci_id,
    memory_partitions,
    partition_count,
)

from .facts import AllocMode, Card, DriverCaps, Partition
from .kfd import KfdNode
from .sysfs import SysfsCard


class CardState(NamedTuple):
    """The card's mode as far as it is known, and its HBM."""

    known: Accelerator | Unknown
    compute: Compute | None
    memory: Memory | None
    alloc_mode: AllocMode | None
    vram_mib: int | None


def card_from_kfd(index: int, nodes: list[KfdNode], sysfs: SysfsCard | None) -> Card:
    """The card whose visible partitions are those KFD nodes, with its sysfs directory where there is one."""
    first = nodes[0]
    known = by_pci_id(first.device_id)
    derived, notes = _compute_from_kfd(known, nodes)
    facts = {**_catalogued(known, first.device_id), **_from_sysfs(sysfs)}
    if sysfs and sysfs.compute and derived and sysfs.compute != derived:
        notes.append(f"sysfs says {sysfs.compute}, KFD's XCDs say {derived}")
    compute = facts.get("compute_partition") or derived
    state = CardState(known, compute, *(facts.get(k) for k in ("memory_partition", "alloc_mode", "vram_mib")))
    share = None
    if any(node.memory_mib is None for node in nodes):
        share, share_notes = memory_share_mib(state, len(nodes))
        notes += share_notes
    facts |= {"bdf": first.bdf, "gfx": first.gfx or facts["gfx"], "compute_partition": compute}
    facts["numa_node"] = facts.get("numa_node", first.numa_node)
    return Card(
        index=index,
        hive_id=first.hive_id,
        unique_id=first.unique_id,
        partitions=tuple(_partition(place, node, share) for place, node in _placed(nodes)),
        notes=(*notes, *_visible(known, compute, len(nodes)), *facts.pop("notes", ())),
        **facts,
    )


def card_from_sysfs(index: int, sysfs: SysfsCard) -> Card:
    """The card whose only witness is its sysfs directory: partitions follow from its compute mode."""
    known = by_pci_id(sysfs.device_id)
    state = CardState(known, sysfs.compute, sysfs.memory, sysfs.alloc_mode, sysfs.vram_mib)
    facts = {**_catalogued(known, sysfs.device_id), **_from_sysfs(sysfs), "bdf": sysfs.bdf}
    notes = [*facts.pop("notes", ())]
    count = _count_from_mode(state, sysfs.partitionable)
    if not count:
        notes.append("no KFD topology here and no established compute mode: its partitions are unknown")
    partitions = derived_partitions(state, count, notes)
    return Card(index=index, partitions=partitions, notes=tuple(notes), **facts)


def derived_partitions(state: CardState, count: int, notes: list[str]) -> tuple[Partition, ...]:
    """`count` equal partitions of a card nobody enumerated: units and memory by division."""
    if not count:
        return ()
    share, share_notes = memory_share_mib(state, count)
    notes += share_notes
    whole = count == 1 and state.vram_mib is not None
    known = state.known if isinstance(state.known, Accelerator) else None
    shared = Partition(
        index=0,
        compute_units=known.compute_units // count if known else None,
        xcds=known.xcds // count if known and known.partitionable else None,
        memory_mib=share,
        memory_source=None if share is None else "measured" if whole else "derived",
    )
    return tuple(shared.model_copy(update={"index": place}) for place in range(count))


def memory_share_mib(state: CardState, visible: int) -> tuple[int | None, list[str]]:
    """MiB of one partition, by the card's own HBM or the catalogue's, and what to say about it.

    CAPPING divides by the partitions of the mode, ALL by the memory partitions. None where neither the
    HBM nor the mode is known.
    """
    known = state.known if isinstance(state.known, Accelerator) else None
    total = state.vram_mib or (known.hbm_mib if known else None)
    count = partition_count(known.xcds, state.compute) if known and state.compute else None
    if known and not known.partitionable:
        count = 1
    if known is None and state.compute in (None, "SPX") and visible == 1:
        count = 1
    if total is None or not count:
        return None, ["memory per partition unknown: no memory bank, and the mode or the HBM is not known"]
    if state.alloc_mode == "ALL" and state.memory:
        return total // memory_partitions(state.memory), ["allocation mode ALL: siblings share this memory"]
    notes = []
    if state.vram_mib is None:
        notes.append("memory per partition derived from the catalogue's HBM: no memory bank is recorded")
    label = f"{state.compute}/{state.memory}"
    smallest = known.smallest_partition_mib.get(label) if known else None
    return smallest or total // count, notes


def catalogued(pci_id: int) -> dict[str, Any]:
    """The Card fields that the catalogue knows by PCI id; for an unknown card, what to report."""
    return _catalogued(by_pci_id(pci_id), pci_id)


def _catalogued(known: Accelerator | Unknown, pci_id: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"pci_id": f"{pci_id:#06x}" if pci_id else None}
    if isinstance(known, Unknown):
        return {**facts, "product": "unknown", "gfx": None, "report": known.report}
    return {
        **facts,
        "product": known.product_of(pci_id),
        "gfx": known.gfx,
        "partitionable": known.partitionable,
        "notes": tuple(f"{figure}: not established for this product" for figure in known.unverified),
    }


def _from_sysfs(sysfs: SysfsCard | None) -> dict[str, Any]:
    """The Card fields that sysfs knows; a field it does not know is left out."""
    if sysfs is None:
        return {}
    caps = DriverCaps(compute=sysfs.compute_caps, memory=sysfs.memory_caps)
    found = {
        "compute_partition": sysfs.compute,
        "memory_partition": sysfs.memory,
        "alloc_mode": sysfs.alloc_mode,
        "numa_node": sysfs.numa_node,
        "vram_mib": sysfs.vram_mib,
        "caps": caps if caps != DriverCaps() else None,
        "partitionable": True if sysfs.partitionable else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _compute_from_kfd(known: Accelerator | Unknown, nodes: list[KfdNode]) -> tuple[Compute | None, list[str]]:
    """The compute mode that those XCDs per node can only mean, and what to say where none follows."""
    if isinstance(known, Unknown) or not known.partitionable:
        return None, []
    sizes = {node.xcds for node in nodes}
    per_partition = sizes.pop() if len(sizes) == 1 else None
    fitting = [
        mode
        for mode in COMPUTE_MODES
        if (count := partition_count(known.xcds, mode))
        and per_partition == known.xcds // count
        and mode in known.compute_modes
    ]
    if len(fitting) == 1:
        return fitting[0], []
    return None, [f"compute mode unknown: {per_partition} XCDs per partition of {known.xcds}"]


def _count_from_mode(state: CardState, partitionable: bool) -> int:
    if not partitionable:
        return 1
    if state.compute == "SPX":
        return 1
    if isinstance(state.known, Unknown) or state.compute is None:
        return 0
    return partition_count(state.known.xcds, state.compute)


def _placed(nodes: list[KfdNode]) -> list[tuple[int, KfdNode]]:
    """Each node with its number on the card: the PCI function's where they differ, else KFD's order."""
    places = [node.partition_index for node in nodes]
    distinct = len(set(places)) == len(places)
    return sorted(zip(places if distinct else range(len(nodes)), nodes, strict=True), key=lambda pair: pair[0])


def _partition(place: int, node: KfdNode, share_mib: int | None) -> Partition:
    measured = node.memory_mib is not None
    return Partition(
        index=place,
        compute_units=node.compute_units,
        memory_mib=node.memory_mib if measured else share_mib,
        memory_source="measured" if measured else None if share_mib is None else "derived",
        xcds=node.xcds,
        render_minor=node.render_minor,
        kfd_node=node.number,
    )


def _visible(known: Accelerator | Unknown, compute: Compute | None, seen: int) -> list[str]:
    if isinstance(known, Unknown) or compute is None:
        return []
    whole = partition_count(known.xcds, compute)
    return [] if seen == whole else [f"{seen} of the card's {whole} partitions are visible here"]


_FILLED = ("compute_partition", "memory_partition", "alloc_mode", "numa_node", "hive_id", "gfx", "vram_mib")


def merge_cards(cards: tuple[Card, ...], saved: tuple[Card, ...]) -> tuple[Card, ...]:
    """Each card with its saved twin: by PCI address where both have one, else by order.

    Raises NodeError where the saved output cannot be of this node.
    """
    if not cards:
        return saved
    saved = _as_grouped(cards, saved)
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


def _as_grouped(cards: tuple[Card, ...], saved: tuple[Card, ...]) -> tuple[Card, ...]:
    """Saved rows that name no card, by address or partition id, as cards of a node that shows as many devices."""
    devices = sum(len(card.partitions) for card in cards)
    if any(card.bdf or len(card.partitions) != 1 for card in saved) or not len(cards) < len(saved) == devices:
        return saved
    rest = iter(saved)
    groups = [[next(rest) for _ in card.partitions] for card in cards]
    return tuple(
        group[0].model_copy(
            update={"partitions": tuple(_placed_at(place, one.partitions[0]) for place, one in enumerate(group))}
        )
        for group in groups
    )


def _placed_at(place: int, partition: Partition) -> Partition:
    return partition.model_copy(update={"index": place})


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
