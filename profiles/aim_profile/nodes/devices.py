"""A node's devices one by one: what a runtime binds to and what a model is sized on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from aim_profile.errors import NodeError
from aim_profile.gpus.catalog import Compute, Deployment, Memory, PartitionMode
from aim_profile.gpus.modes import DeviceMode
from aim_profile.units import MIB

from .facts import CPU, CPU_MODE, AllocMode, Card, Node, Partition


@dataclass(frozen=True)
class Device:
    """One partition of a card, a whole card, or a CPU set of a node without a GPU.

    card, partition: its place on the node; product: of the catalogue, `unknown`, or `cpu`. memory_mib: what it
    reports, compute_units: of a GPU, or cores; None: not readable here. cpus: ids of the cores of a CPU set, empty for
    a GPU. compute_partition, memory_partition: the card's modes now, None: it has none, or it is not readable. mode:
    the same with the catalogue's facts and this device's own memory, None for a CPU set and where it is not known.
    """

    kind: Literal["gpu", "cpu"]
    card: int
    partition: int
    product: str
    memory_mib: int | None
    compute_units: int | None
    render_minor: int | None = None
    compute_partition: Compute | None = None
    memory_partition: Memory | None = None
    alloc_mode: AllocMode | None = None
    cpus: tuple[int, ...] = ()
    mode: PartitionMode | None = field(default=None, repr=False)

    @property
    def memory_bytes(self) -> int | None:
        """Bytes it reports, None when unknown."""
        return None if self.memory_mib is None else self.memory_mib * MIB

    @property
    def label(self) -> str:
        """`card 0 partition 3 (MI300X CPX/NPS4)`."""
        mode = self.mode.label if self.mode else "CPU set" if self.kind == "cpu" else "unknown mode"
        return f"card {self.card} partition {self.partition} ({self.product} {mode})"


class CpuMode(DeviceMode):
    """The only mode of a node without a GPU: it is cut into CPU sets as somebody said, and nothing switches that."""

    @property
    def label(self) -> str:
        """`CPU`."""
        return CPU_MODE


def cpu_mode(card: Card) -> CpuMode:
    """That of a card of processors, sized by its smallest set."""
    return CpuMode(
        accelerator=CPU,
        partitions=len(card.partitions),
        cus=min((part.compute_units or 0 for part in card.partitions), default=0),
        memory_mib=min((part.memory_mib or 0 for part in card.partitions), default=0),
        tier="driver-legal",
    )


def devices_of(node: Node) -> tuple[Device, ...]:
    """Every device of the node, in the order of its cards and their partitions."""
    deployment = "bare-metal" if node.deployment == "unknown" else node.deployment
    return tuple(_device(card, part, deployment) for card in node.cards for part in card.partitions)


def refuse_larger(node: Node, machine: Node) -> None:
    """Raises NodeError where the CPU sets of `node` are more than `machine`, as it was read, can give them.

    Sets may share cores; their memory adds up. Nothing is refused where `machine` does not say what it has.
    """
    there = [device for device in devices_of(machine) if device.kind == "cpu"]
    wanted = [device for device in devices_of(node) if device.kind == "cpu"]
    cpus = {cpu for device in there for cpu in device.cpus}
    for device in wanted:
        if cpus and (missing := [cpu for cpu in device.cpus if cpu not in cpus]):
            raise NodeError(
                f"{device.label}: CPU {missing[0]} is none that this process may use",
                field="cpus",
                value=device.cpus,
                remedy=f"name some of {', '.join(map(str, sorted(cpus)[:16]))}{', …' * (len(cpus) > 16)}",
            )
    need, have = (sum(device.memory_mib or 0 for device in devices) for devices in (wanted, there))
    if have and need > have:
        raise NodeError(
            f"the CPU sets take {need} MiB of memory, {need - have} more than the {have} MiB that may be used here",
            field="memory",
            value=need,
            remedy="give them less, or free some",
        )


def _device(card: Card, part: Partition, deployment: Deployment) -> Device:
    try:
        mode = None if card.is_cpu else mode_of(card, deployment)
    except NodeError:
        mode = None
    if mode is not None and part.memory_mib is not None:
        mode = mode.model_copy(update={"memory_mib": part.memory_mib})
    return Device(
        kind="cpu" if card.is_cpu else "gpu",
        card=card.index,
        partition=part.index,
        product=card.product,
        memory_mib=part.memory_mib,
        compute_units=part.compute_units,
        render_minor=part.render_minor,
        compute_partition=card.compute_partition,
        memory_partition=card.memory_partition,
        alloc_mode=card.alloc_mode,
        cpus=part.cpus,
        mode=mode,
    )


def mode_of(card: Card, deployment: Deployment) -> PartitionMode:
    """The mode a GPU is in, with the memory its smallest device reports. Raises NodeError where it is not known."""
    accelerator = card.accelerator
    if accelerator is None:
        report = card.report or ""
        raise NodeError(f"card {card.index} is not in the catalogue", field="card", value=card.pci_id, remedy=report)
    label = card.mode_label or (None if accelerator.partitionable else "SPX/NPS1")
    if label is None:
        raise NodeError(
            f"card {card.index}: its partition mode is not readable here",
            field="partition",
            remedy="give --gpu and --partition instead",
        )
    mode = accelerator.mode(label, deployment)
    sizes = [part.memory_mib for part in card.partitions if part.memory_mib]
    return mode.model_copy(update={"memory_mib": min(sizes, default=mode.memory_mib)})
