"""One look at a node, at a scrape: what is read of it, what of that is not as planned, what it costs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from aim_profile.errors import AimProfileError, NodeError
from aim_profile.nodes.facts import Node
from aim_profile.nodes.kfd import read_topology
from aim_profile.nodes.read import places
from aim_profile.nodes.sysfs import vram_use
from aim_profile.plans.compare import Difference, plan_assert
from aim_profile.plans.dcm import Strategy
from aim_profile.plans.plan import Plan

from .followed import Followed
from .prices import Prices

Source = Literal["kernel", "plan", "prices"]


class VramUse(NamedTuple):
    """Bytes of a whole card."""

    used: int
    total: int


class Observation(NamedTuple):
    """node None: what the kernel says of it cannot be understood. vram: by card, where it can be read. differences:
    from the plan; None: there is none, or it cannot be compared. ok: which sources are as they should be."""

    name: str
    node: Node | None
    vram: Mapping[int, VramUse]
    differences: tuple[Difference, ...] | None
    prices: Prices | None
    ok: Mapping[Source, bool]
    strategy: Strategy


class Observer:
    """Looks at one node as often as it is asked, and changes nothing. Thread-safe.

    Args:
        read: the node; may raise NodeError.
        root: where its kernel files are; None: nowhere, as of an emulated node.
        name: its name here and in the plan; None: its own.
        strategy: the device plugin's, for the names of resources.
        complain: told in one line what is wrong with a source, once until that changes.
    """

    def __init__(
        self,
        read: Callable[[], Node],
        root: Path | None,
        name: str | None = None,
        *,
        plan: Followed[Plan] | None = None,
        prices: Followed[Prices] | None = None,
        strategy: Strategy = "mixed",
        complain: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._read, self._root, self._name = read, root, name
        self._plan, self._prices, self._strategy = plan, prices, strategy
        self._complain = complain
        self._said: dict[Source, str | None] = {}
        self._lock = threading.Lock()

    def look(self) -> Observation:
        """The node as it is now. Never raises for what is read: that is told and left out."""
        with self._lock:
            problems: dict[Source, AimProfileError | None] = {"kernel": None}
            node = self._node(problems)
            name = self._name or (node.name if node else None) or ""
            differences = self._compared(node, problems)
            prices = self._prices.now() if self._prices else None
            if self._prices and (prices or self._prices.problem):
                problems["prices"] = self._prices.problem
            vram = self._vram(node, problems)
            self._tell(problems)
            ok = {source: problem is None for source, problem in problems.items()}
            return Observation(name, node, vram, differences, prices, ok, self._strategy)

    def _node(self, problems: dict[Source, AimProfileError | None]) -> Node | None:
        try:
            node = self._read()
            hidden = node.backend == "proc" and self._root is not None and _hidden(self._root)
        except NodeError as problem:
            problems["kernel"] = problem
            return None
        # GPUs are there that this process may not see: the processors are not all there is.
        return node.model_copy(update={"cards": ()}) if hidden else node

    def _compared(
        self, node: Node | None, problems: dict[Source, AimProfileError | None]
    ) -> tuple[Difference, ...] | None:
        if self._plan is None:
            return None
        plan = self._plan.now()
        if plan or self._plan.problem:
            problems["plan"] = self._plan.problem
        if node is None or plan is None:
            return None
        try:
            return plan_assert(node, plan, self._name)
        except AimProfileError as problem:
            problems["plan"] = problem
            return None

    def _vram(self, node: Node | None, problems: dict[Source, AimProfileError | None]) -> dict[int, VramUse]:
        if node is None or self._root is None:
            return {}
        found: dict[int, VramUse] = {}
        folders = _pci_folders(self._root)
        for card in node.cards:
            try:
                use = next((use for folder in folders if card.bdf and (use := vram_use(folder / card.bdf))), None)
            except NodeError as problem:
                problems["kernel"] = problem
                continue
            if use is not None:
                found[card.index] = VramUse(*use)
        return found

    def _tell(self, problems: Mapping[Source, AimProfileError | None]) -> None:
        for source, problem in problems.items():
            said = None if problem is None else str(problem)
            if said is not None and said != self._said.get(source):
                self._complain(said)
            self._said[source] = said


def _pci_folders(root: Path) -> list[Path]:
    """Where a tree may have the driver's `<bdf>/` directories."""
    pci = places(root).pci
    return [*([pci] if pci else []), *(root / below / "bus/pci/devices" for below in ("sys", ""))]


def _hidden(root: Path) -> bool:
    """Whether KFD has nodes that this process may not read, as in a container without its devices."""
    kfd = places(root).kfd
    return kfd is not None and read_topology(kfd).hidden > 0
