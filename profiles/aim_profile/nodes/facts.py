"""What a node is: cards, the partitions each shows, and how sure each figure is.

These types are what every backend produces, what `-o json` prints and what an emulation file holds.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from aim_profile.gpus.catalog import (
    Accelerator,
    Compute,
    Deployment,
    Memory,
    PartitionMode,
    Tier,
    Unknown,
    by_pci_id,
    structurally_legal,
)
from aim_profile.units import MIB

AllocMode = Literal["CAPPING", "ALL"]
Backend = Literal["kfd", "sysfs", "sysfs+kfd", "amdsmi", "amd-smi", "emulated", "proc", "none"]
#: The product of the card that stands for a machine without a GPU; its partitions are CPU sets.
CPU = "cpu"
#: Its only mode, in the place of `CPX/NPS4`.
CPU_MODE = "CPU"
#: Linux is built for at most so many (NR_CPUS of CONFIG_MAXSMP).
MOST_CPUS = 8192


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def checked_cpus(cpus: tuple[int, ...]) -> tuple[int, ...]:
    """The ids in order. Raises ValueError for one that is no CPU, or is there twice."""
    if wrong := [cpu for cpu in cpus if not 0 <= cpu < MOST_CPUS]:
        raise ValueError(f"{wrong[0]} is no CPU: ids go from 0 to {MOST_CPUS - 1}")
    ordered = sorted(cpus)
    if (twice := next((cpu for cpu, after in pairwise(ordered) if cpu == after), None)) is not None:
        raise ValueError(f"CPU {twice} is there twice: name each once")
    return tuple(ordered)


class Partition(_Frozen):
    """One device as a runtime sees it. index: its place on the card; memory_mib: what it reports.

    memory_source: measured (read on the node) or derived (the card's or the catalogue's HBM divided).
    render_minor: N of /dev/dri/renderDN. None: not readable here. cpus: ids of the cores of a CPU set, whose
    compute_units are cores; a GPU's partition has none, and does not show the field.
    """

    index: int = Field(ge=0)
    compute_units: int | None = Field(default=None, ge=0)
    memory_mib: int | None = Field(default=None, ge=0)
    memory_source: Literal["measured", "derived"] | None = None
    xcds: int | None = Field(default=None, ge=0)
    render_minor: int | None = Field(default=None, ge=0)
    kfd_node: int | None = Field(default=None, ge=0)
    cpus: tuple[int, ...] = ()

    @field_validator("cpus")
    @classmethod
    def _each_cpu_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return checked_cpus(value)

    @model_serializer(mode="wrap")
    def _without_empty_cpus(self, as_usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        shown: dict[str, Any] = as_usual(self)
        if not self.cpus:
            shown.pop("cpus", None)
        return shown

    @property
    def memory_bytes(self) -> int | None:
        """Bytes it reports, None when unknown."""
        return None if self.memory_mib is None else self.memory_mib * MIB


class DriverCaps(_Frozen):
    """What the card's own driver says it can do; overrides the catalogue.

    compute, memory: the modes listed (sysfs available_*); combinations: `CPX/NPS4` pairs where the
    accelerator profiles name them (amd-smi partition -a), empty where only the lists are known.
    """

    compute: tuple[Compute, ...] = ()
    memory: tuple[Memory, ...] = ()
    combinations: tuple[str, ...] = ()


class Card(_Frozen):
    """One GPU, or the processors of a machine without one (product `cpu`).

    pci_id: PCI device id (`0x74a1`); bdf: its PCI address; product: catalogue name or `unknown`.

    compute_partition/memory_partition None: not readable here, or the card cannot be partitioned
    (`partitionable` says which). alloc_mode CAPPING: a partition gets its share of the memory; ALL: each
    sees all of its memory partition. report: what to send us about an unknown card.
    """

    index: int = Field(ge=0)
    bdf: str | None = None
    pci_id: str | None = None
    product: str = "unknown"
    gfx: str | None = None
    partitionable: bool | None = None
    compute_partition: Compute | None = None
    memory_partition: Memory | None = None
    alloc_mode: AllocMode | None = None
    hive_id: int | None = None
    unique_id: int | None = None
    numa_node: int | None = None
    vram_mib: int | None = None
    caps: DriverCaps | None = None
    partitions: tuple[Partition, ...] = ()
    report: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        """Whether it is no GPU but the machine's processors; its partitions are CPU sets."""
        return self.product == CPU

    @property
    def accelerator(self) -> Accelerator | None:
        """The catalogue's entry, None for an unknown card."""
        if self.pci_id is None:
            return None
        found = by_pci_id(int(self.pci_id, 16))
        return None if isinstance(found, Unknown) else found

    @property
    def mode_label(self) -> str | None:
        """`CPX/NPS4`, None unless both halves are known."""
        if self.compute_partition is None or self.memory_partition is None:
            return None
        return f"{self.compute_partition}/{self.memory_partition}"

    @property
    def planned_as(self) -> str | None:
        """Its mode as a plan names it: a card that cannot be partitioned is SPX/NPS1, processors are CPU."""
        if self.is_cpu:
            return CPU_MODE
        return self.mode_label or ("SPX/NPS1" if self.partitionable is False else None)

    @property
    def mode_text(self) -> str:
        """The mode for people, as far as it is known: `CPX/NPS?` where only KFD was read."""
        if self.partitionable is False:
            return CPU_MODE if self.is_cpu else "not partitionable"
        if self.compute_partition is None and self.memory_partition is None:
            return "unknown"
        return f"{self.compute_partition or '?'}/{self.memory_partition or 'NPS?'}"

    def modes(
        self, deployment: Deployment = "bare-metal", at_least: Tier = "driver-legal"
    ) -> tuple[PartitionMode, ...]:
        """The modes this very card can take: the catalogue's, corrected by what its driver says.

        A mode the driver does not list is left out; a pair its profiles name counts as driver-legal even
        where the catalogue knows nothing of it. Empty for an unknown card.
        """
        accelerator = self.accelerator
        if accelerator is None:
            return ()
        caps = self.caps or DriverCaps()
        modes = [m for m in accelerator.modes(deployment, "unsupported") if _allowed(m, caps, self.memory_partition)]
        listed = {m.label for m in modes}
        named = [label for label in caps.combinations if label not in listed]
        modes += [accelerator.mode(label, deployment) for label in named if _possible(accelerator, label)]
        modes = [_raised(mode, caps) for mode in modes]
        order: tuple[Tier, ...] = ("validated", "driver-legal", "unsupported")
        kept = [mode for mode in modes if order.index(mode.tier) <= order.index(at_least)]
        return tuple(sorted(kept, key=lambda m: (order.index(m.tier), m.partitions, m.memory)))


class Node(_Frozen):
    """One machine. cards: in PCI order; deployment: bare-metal, passthrough, sr-iov or unknown.

    backend: what the facts were read from; notes: what could not be read, and why.
    """

    name: str | None = None
    deployment: Deployment | Literal["unknown"] = "unknown"
    backend: Backend = "emulated"
    cards: tuple[Card, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """Devices a runtime could use: partitions of all cards."""
        return sum(len(card.partitions) for card in self.cards)


def _allowed(mode: PartitionMode, caps: DriverCaps, current: Memory | None) -> bool:
    """The driver lists compute modes for the memory mode it is in, so they bind modes of that one only."""
    if caps.combinations:
        return mode.label in caps.combinations
    if caps.memory and mode.memory not in caps.memory:
        return False
    return not caps.compute or mode.memory != current or mode.compute in caps.compute


def _raised(mode: PartitionMode, caps: DriverCaps) -> PartitionMode:
    if mode.tier != "unsupported" or mode.label not in caps.combinations:
        return mode
    source = {"tier": "driver-legal", "source": "this card's driver", "confidence": "documented"}
    return mode.model_copy(update=source)


def _possible(accelerator: Accelerator, label: str) -> bool:
    compute, _, memory = label.partition("/")
    return structurally_legal(accelerator.xcds, compute, memory)  # type: ignore[arg-type]
