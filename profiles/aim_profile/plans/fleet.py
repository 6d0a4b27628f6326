"""Fleet: nodes and their cards, as the planner needs them, from YAML, emulation files or live nodes.

version: 1
nodes:
- {name: gpu, count: 250, gpu: MI300X, cards: 8, compute_partition: SPX, memory_partition: NPS1}   # gpu-000 … gpu-249
- {name: edge, gpu: MI308X, cards: 4, labels: {zone: a}}
- {file: node-a.yaml}                                     # what `aim-profile node export` wrote
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aim_profile.errors import AimProfileError, GpuError
from aim_profile.files.kinds import looks_like
from aim_profile.files.read import Parsed, check_as, located, parsed, read_parsed
from aim_profile.gpus.catalog import (
    TIERS,
    Compute,
    Deployment,
    Memory,
    Tier,
    by_name,
    can_switch,
)
from aim_profile.gpus.modes import DeviceMode
from aim_profile.nodes.devices import cpu_mode
from aim_profile.nodes.emulated import load_emulated, node_of
from aim_profile.nodes.facts import CPU, Card, Node

from .workload import Whole

MAX_NODES = 100_000
_LONGEST_NAME = 253


class FleetError(AimProfileError):
    """A fleet that cannot be planned for. `field` is the path of the key: `nodes[2].gpu`."""


class UnusableNodeError(FleetError):
    """A node no plan can use: it has no cards, of an unknown product, or of several. Others can be planned for."""

    def __init__(self, node: str, problem: str, *, value: object = None, remedy: str = "") -> None:
        self.node = node
        super().__init__(f"node {node} {problem}", field="gpu", value=value, remedy=remedy)


@dataclass(frozen=True)
class FleetCard:
    """One card. current: its mode (`CPX/NPS4`), None where not readable; hive: cards of one hive reach each other.

    modes: what its catalogue entry and its driver allow, any tier; device_mib: what a device reports in `current`.
    """

    index: int
    current: str | None
    modes: tuple[DeviceMode, ...]
    hive: int = 0
    device_mib: int | None = None

    def allowed(self, tier: Tier, switchable: bool = True) -> tuple[DeviceMode, ...]:
        """Its modes at that tier or better, sized by what its devices report where that is known.

        Not switchable: the mode it is in, whatever its tier.
        """
        kept = (
            m
            for m in self.modes
            if (TIERS.index(m.tier) <= TIERS.index(tier) if switchable else m.label == self.current)
        )
        return tuple(self._measured(mode) for mode in kept)

    def mode(self, label: str | None) -> DeviceMode | None:
        """Its mode of that label, sized by what its devices report where that is known; None where it has none."""
        return next((self._measured(mode) for mode in self.modes if mode.label == label), None)

    def _measured(self, mode: DeviceMode) -> DeviceMode:
        if mode.label != self.current or self.device_mib is None or self.device_mib >= mode.memory_mib:
            return mode
        return mode.model_copy(update={"memory_mib": self.device_mib})


@dataclass(frozen=True)
class FleetNode:
    """One machine with cards of one product. deployment sr-iov, unknown: its modes are used as found.

    gpu `cpu`: it has none, and its CPU sets are its devices.
    """

    name: str
    gpu: str
    deployment: Deployment | Literal["unknown"]
    cards: tuple[FleetCard, ...]
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def is_cpu(self) -> bool:
        """Whether it has no GPU."""
        return self.gpu == CPU

    @property
    def switchable(self) -> bool:
        """Whether its modes may be changed: not by an SR-IOV guest, nor where it is unknown if a hypervisor lets it."""
        return not self.is_cpu and can_switch(self.deployment)


class SetAside(NamedTuple):
    """A node (or, by `count`, several of one name) that no plan can use, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Fleet:
    """Nodes by name, in the order of their names; set_aside: those that no plan can use."""

    nodes: tuple[FleetNode, ...]
    set_aside: tuple[SetAside, ...] = ()

    @property
    def cards(self) -> int:
        """Cards of all nodes."""
        return sum(len(node.cards) for node in self.nodes)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeEntry(_Frozen):
    """One entry of a fleet file: `count` equal nodes, or a node file. A given key wins over the file's."""

    name: str | None = Field(default=None, pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=_LONGEST_NAME)
    count: Whole | None = Field(default=None, ge=1, le=MAX_NODES)
    gpu: str | None = None
    cards: Whole = Field(default=8, ge=1, le=64)
    deployment: Deployment | None = None
    compute_partition: Compute | None = None
    memory_partition: Memory | None = None
    labels: Mapping[str, str] = Field(default_factory=dict)
    file: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.file is None and (self.gpu is None or self.name is None):
            raise ValueError("give name and gpu, or file: what `aim-profile node export` wrote")
        if self.count is not None and len(f"{self.name}-{self.count - 1}") > _LONGEST_NAME:
            raise ValueError(f"name: with its number longer than the {_LONGEST_NAME} characters of a node's name")
        described = self.model_fields_set & {"gpu", "cards", "compute_partition", "memory_partition", "count"}
        if self.file is not None and described:
            raise ValueError(f"{', '.join(sorted(described))}: a node file says that itself")
        return self


class FleetFile(_Frozen):
    """A fleet file."""

    version: Literal[1] = 1
    nodes: tuple[NodeEntry, ...] = Field(min_length=1)


def load_fleet(file: Path, *, strict: bool = False) -> Fleet:
    """A fleet from a fleet file, or from one emulation file (a fleet of one node).

    Nodes of an unknown product are set aside; strict: they are errors, as they are where no node is left.
    Raises FleetError or NodeError naming the file, the key and the value.
    """
    return fleet_from(read_parsed(file, FleetError), file.parent, strict=strict)


def parse_fleet(text: str, named: str = "fleet", folder: Path | None = None, *, strict: bool = False) -> Fleet:
    """The same from text; node files are looked for in `folder`."""
    return fleet_from(parsed(text, named, FleetError), folder or Path(), strict=strict)


def fleet_from(file: Parsed, folder: Path, *, strict: bool = False) -> Fleet:
    """The same from a file that was parsed to see what it is."""
    if looks_like(file.raw) == "emulation file":
        return fleet_of([node_of(file)])
    entries = check_as(FleetFile, file, FleetError, "fleet file").nodes
    nodes: dict[str, FleetNode] = {}
    places: dict[str, int] = {}
    set_aside: list[SetAside] = []
    first: FleetError | None = None
    for at, entry in enumerate(entries):
        try:
            for node in _nodes(entry, folder):
                _refuse_again(node.name, places.setdefault(node.name, at), at)
                nodes[node.name] = node
        except AimProfileError as problem:
            if strict or not isinstance(problem, UnusableNodeError | GpuError):
                raise _refused(at, entry, problem, file) from problem
            # Finding the line reads the text again: once is enough.
            first = first or _refused(at, entry, problem, file)
            name = problem.node if isinstance(problem, UnusableNodeError) else entry.name or ""
            set_aside.append(SetAside(name, problem.problem))
    if first is not None and not nodes:
        raise first
    return replace(_sorted(nodes.values()), set_aside=tuple(sorted(set_aside)))


def _refuse_again(name: str, first: int, at: int) -> None:
    if first != at:
        raise FleetError(
            f"{name!r} names a node of nodes[{first}] too",
            field="name",
            value=name,
            remedy="names are unique; `count` numbers them",
        )


def _refused(at: int, entry: NodeEntry, problem: AimProfileError, file: Parsed) -> FleetError:
    key = "file" if entry.file else problem.field
    where, at_line = f"nodes[{at}].{key}", located(file.named, file.text, ("nodes", at, key))
    return FleetError(f"{at_line}: {where}: {problem.problem}", field=where, value=problem.value, remedy=problem.remedy)


def fleet_of(nodes: Iterable[Node]) -> Fleet:
    """A fleet of nodes that were read (live, recorded or emulated). Raises FleetError."""
    found = [_from_node(node, NodeEntry(file="-")) for node in nodes]
    places: dict[str, int] = {}
    for at, node in enumerate(found):
        _refuse_again(node.name, places.setdefault(node.name, at), at)
    return _sorted(found)


def _sorted(nodes: Iterable[FleetNode]) -> Fleet:
    return Fleet(tuple(sorted(nodes, key=lambda node: node.name)))


def _nodes(entry: NodeEntry, folder: Path) -> list[FleetNode]:
    if entry.file is not None:
        return [_from_node(load_emulated(folder / entry.file), entry)]
    assert entry.name is not None
    assert entry.gpu is not None
    one = _described(entry, entry.name, entry.gpu)
    if entry.count is None:
        return [one]
    width = len(str(entry.count - 1))
    return [replace(one, name=f"{entry.name}-{number:0{width}d}") for number in range(entry.count)]


def _described(entry: NodeEntry, name: str, gpu: str) -> FleetNode:
    accelerator = by_name(gpu)
    deployment = entry.deployment or "bare-metal"
    label = f"{entry.compute_partition or 'SPX'}" + (f"/{entry.memory_partition}" if entry.memory_partition else "")
    current = accelerator.mode(label, deployment)
    card = FleetCard(0, current.label, accelerator.modes(deployment, "unsupported"))
    cards = tuple(replace(card, index=index) for index in range(entry.cards))
    return FleetNode(name, accelerator.name, deployment, cards, tuple(sorted(entry.labels.items())))


def _from_node(node: Node, entry: NodeEntry) -> FleetNode:
    name = entry.name or node.name
    if name is None:
        raise FleetError("the node has no name", field="name", remedy="give name: beside file")
    if not node.cards:
        raise UnusableNodeError(name, "holds no AMD GPU", remedy="leave it out, or describe it: gpu, cards")
    products = sorted({card.product for card in node.cards})
    if len(products) != 1 or products == ["unknown"]:
        report = next((card.report for card in node.cards if card.report), "")
        found = ", ".join(products)
        raise UnusableNodeError(name, f"holds {found}, not cards of one known product", value=found, remedy=report)
    deployment = entry.deployment or node.deployment
    cards = tuple(_from_card(card, deployment) for card in node.cards)
    return FleetNode(name, products[0], deployment, cards, tuple(sorted(entry.labels.items())))


def _from_card(card: Card, deployment: Deployment | Literal["unknown"]) -> FleetCard:
    if card.is_cpu:
        return FleetCard(card.index, card.planned_as, (cpu_mode(card),))
    current = card.planned_as
    reported = [part.memory_mib for part in card.partitions if part.memory_mib and part.memory_source == "measured"]
    modes = card.modes("bare-metal" if deployment == "unknown" else deployment, "unsupported")
    # Without a hive id nothing says that cards are apart; AMD's 8-card boards are one hive.
    return FleetCard(card.index, current, modes, card.hive_id or 0, min(reported, default=None))
