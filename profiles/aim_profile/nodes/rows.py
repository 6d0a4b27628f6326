"""From amd-smi's rows, one per device, to cards: partitions of a card stand in consecutive rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from aim_profile.gpus.catalog import Accelerator, Compute, Memory, Unknown, by_pci_id, partition_count

from .cards import CardState, catalogued, memory_share_mib
from .facts import AllocMode, Card, DriverCaps, Partition

# Firmware takes megabytes of a card, unevenly; the next mode's share is half as large.
_SHARE_TOLERANCE = 0.02


class Row(BaseModel):
    """What amd-smi says of one device; None where it says nothing or N/A. needs_root: all was N/A."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: int
    bdf: str | None = None
    uuid: str | None = None
    device_id: int | None = None
    market_name: str | None = None
    compute_units: int | None = None
    gfx: str | None = None
    numa_node: int | None = None
    hive_id: int | None = None
    render_minor: int | None = None
    kfd_node: int | None = None
    partition_id: int | None = None
    compute: Compute | None = None
    memory: Memory | None = None
    alloc_mode: AllocMode | None = None
    memory_mib: int | None = None
    caps_compute: tuple[Compute, ...] = ()
    caps_memory: tuple[Memory, ...] = ()
    combinations: tuple[str, ...] = ()
    needs_root: bool = False

    def joined(self, other: Row) -> Row:
        """Both rows of one device: what this one leaves open, the other fills."""
        blank = {name: value for name, value in other if getattr(self, name) in (None, (), False)}
        return self.model_copy(update={**blank, "needs_root": self.needs_root or other.needs_root})

    def with_profile(
        self, compute: Compute | None, memory: tuple[Memory, ...], current: bool, partition_id: int | None
    ) -> Row:
        """This row after one accelerator profile of its card was read."""
        if compute is None:
            return self
        update: dict[str, Any] = {
            "caps_compute": (*self.caps_compute, compute),
            "combinations": (*self.combinations, *(f"{compute}/{mode}" for mode in memory)),
        }
        if current:
            update |= {"compute": compute, "partition_id": partition_id}
        return self.model_copy(update=update)

    @property
    def pci_id(self) -> int | None:
        """The device id: as written, else from the UUID amdsmi builds (0x<xx><ff><device id>)."""
        if self.device_id is not None or self.uuid is None:
            return self.device_id
        found = re.match(r"[0-9a-fA-F]{4}([0-9a-fA-F]{4})-", self.uuid)
        return int(found.group(1), 16) if found else None


def cards_from_rows(rows: Mapping[int, Row]) -> tuple[Card, ...]:
    """Cards in amd-smi's order. A new card begins at another PCI slot, or at partition 0."""
    groups: list[list[Row]] = []
    for gpu in sorted(rows):
        row = rows[gpu]
        if groups and _same_card(groups[-1], row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return tuple(_card(index, group) for index, group in enumerate(groups))


def _same_card(group: list[Row], row: Row) -> bool:
    if group[0].bdf is not None and row.bdf is not None:
        return group[0].bdf.rpartition(".")[0] == row.bdf.rpartition(".")[0]
    before = group[-1].partition_id
    return before is not None and row.partition_id is not None and row.partition_id == before + 1


def _card(index: int, group: list[Row]) -> Card:
    first = group[0]
    pci_id = next((row.pci_id for row in group if row.pci_id is not None), None)
    notes: list[str] = []
    facts: dict[str, Any] = catalogued(pci_id) if pci_id else {}
    notes += facts.pop("notes", ())
    if not pci_id:
        notes.append("no device id in this output: add that of `amd-smi static --json`")
    elif all(row.device_id is None for row in group):
        notes.append("device id read from the UUID")
    if first.needs_root:
        notes.append("partition profiles read N/A: amd-smi shows them to root only")
    compute = next((row.compute for row in group if row.compute), None)
    memory = next((row.memory for row in group if row.memory), None)
    alloc_mode = next((row.alloc_mode for row in group if row.alloc_mode), None)
    known = by_pci_id(pci_id) if pci_id else None
    if compute is None and isinstance(known, Accelerator) and len(group) == known.xcds > 1:
        compute = "CPX"  # as many devices as XCDs can mean nothing else
        notes.append("compute mode CPX: the card shows as many devices as it has XCDs")
    if compute is None and isinstance(known, Accelerator) and alloc_mode != "ALL":
        compute = _compute_from_memory(known, [row.memory_mib for row in group])
        if compute:
            notes.append(f"compute mode {compute}: {len(group)} devices with {1 / len(group):.0%} of its memory each")
    caps = DriverCaps(
        compute=tuple(dict.fromkeys(first.caps_compute)),
        memory=tuple(dict.fromkeys(first.caps_memory)),
        combinations=tuple(dict.fromkeys(first.combinations)),
    )
    facts |= {"gfx": first.gfx or facts.get("gfx")}
    state = CardState(known, compute, memory, alloc_mode, None) if known else None
    partitions = tuple(_partition(place, row, state, len(group), notes) for place, row in enumerate(group))
    return Card(
        index=index,
        bdf=None if first.bdf is None else f"{first.bdf.rpartition('.')[0]}.0",
        compute_partition=compute,
        memory_partition=memory,
        alloc_mode=alloc_mode,
        hive_id=first.hive_id,
        numa_node=first.numa_node,
        caps=caps if caps != DriverCaps() else None,
        partitions=partitions,
        notes=tuple(dict.fromkeys(notes)),
        **facts,
    )


def _compute_from_memory(known: Accelerator, each_mib: list[int | None]) -> Compute | None:
    """The mode that makes as many devices as are shown, where each reports its share of the card's memory.

    Fewer devices of a finer mode would report less; under allocation mode ALL, which is not the default, more.
    """
    share = known.hbm_mib / len(each_mib)
    if any(mib is None or abs(mib - share) > _SHARE_TOLERANCE * share for mib in each_mib):
        return None
    fitting = [mode for mode in known.compute_modes if partition_count(known.xcds, mode) == len(each_mib)]
    return fitting[0] if len(fitting) == 1 else None


def _partition(place: int, row: Row, state: CardState | None, visible: int, notes: list[str]) -> Partition:
    memory_mib = row.memory_mib
    if memory_mib is None and state is not None:
        memory_mib, said = memory_share_mib(state, visible)
        notes += said
    units = row.compute_units
    if units is None and state is not None:
        units = _units(state)
    return Partition(
        index=row.partition_id if row.partition_id is not None else place,
        compute_units=units,
        memory_mib=memory_mib,
        memory_source=None if memory_mib is None else "derived" if row.memory_mib is None else "measured",
        render_minor=row.render_minor,
        kfd_node=row.kfd_node,
    )


def _units(state: CardState) -> int | None:
    """Compute units of one partition of a known card in a known mode."""
    known = state.known
    if isinstance(known, Unknown) or (known.partitionable and state.compute is None):
        return None
    if state.compute is None or not known.partitionable:
        return known.compute_units
    return known.compute_units // known.partitions_in(state.compute)
