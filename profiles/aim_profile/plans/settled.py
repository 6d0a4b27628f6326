"""What of a plan needs no second thought when it is planned again: whole workloads that are asked for as before, stand
where they may, and whom nothing that was asked of others concerns. Linear, and a small constant for each replica.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from aim_profile.plans.search.intake import devices_of
from aim_profile.plans.search.jobs import Jobs, own_level
from aim_profile.plans.search.problem import DeviceKind, Occupied, Option, PlanNode, Selector, least_share, selector
from aim_profile.units import gib

from .fleet import Fleet, FleetCard, FleetNode
from .plan import Placement, Plan, PlanOptions
from .refusal import Standing
from .workload import Workload, Workloads

# A form of node: what two nodes must share for their devices to be of the same kinds.
_Form = tuple[object, ...]
_NONE = (-1, -1)


class _Kind(NamedTuple):
    """A node of that form, and the kind and position of its cards by (index, mode)."""

    example: FleetNode
    at: Mapping[tuple[int, str], tuple[int, int]]
    devices: int


class Settled:
    """The replicas of `previous` that stay without a second thought, on a fleet in the modes it planned.

    placements: by workload; nodes: those of the fleet that still matter to the others, of each form at least one, so
    that they are cut into the same kinds; workloads: the others.
    """

    def __init__(self, fleet: Fleet, workloads: Workloads, previous: Plan, options: PlanOptions) -> None:
        self.placements: dict[str, tuple[Placement, ...]] = {}
        self._forms = {node.name: _form(node) for node in fleet.nodes}
        examples = Fleet(tuple({self._forms[node.name]: node for node in reversed(fleet.nodes)}.values()))
        selectors: set[Selector] = {selector(workload) for workload in workloads.workloads}
        kinds, nodes = devices_of(examples, options, selectors)
        self._kinds = {
            form: _kind(node, planned, kinds)
            for form, node, planned in zip(map(_form, examples.nodes), examples.nodes, nodes, strict=True)
        }
        self._device_kinds = kinds
        self._jobs = Jobs(kinds, nodes, fleet)
        self._needs: dict[tuple[int, int], tuple[int, float]] = {}
        self._shares: dict[int, float] = {}
        self.bound = 0.0
        others = self._sort_out(workloads, previous)
        self.workloads = Workloads.model_construct(version=1, workloads=tuple(others))
        self.nodes = replace(fleet, nodes=tuple(self._mattering(fleet, previous)))

    def _sort_out(self, workloads: Workloads, previous: Plan) -> list[Workload]:
        before: dict[str, list[Placement]] = {}
        for placement in previous.placements:
            before.setdefault(placement.workload, []).append(placement)
        named = {name for each in workloads.workloads for name in (*each.affinity, *each.anti_affinity)}
        others = []
        for workload in workloads.workloads:
            runs = before.get(workload.name, [])
            free = workload.name not in named and _is_free(workload)
            if free and len(runs) == workload.replicas and self._stay(workload, runs):
                self.placements[workload.name] = tuple(runs)
            else:
                others.append(workload)
        return others

    def _stay(self, workload: Workload, runs: Iterable[Placement]) -> bool:
        options = self._jobs.options(workload)
        if not all(_is_as_asked(run, workload) and self._holds(run, options) for run in runs):
            return False
        if id(options) not in self._shares:
            self._shares[id(options)] = least_share(options, self._device_kinds)
        self.bound += workload.replicas * self._shares[id(options)]
        return True

    def _holds(self, run: Placement, options: Mapping[int, Option]) -> bool:
        kind = self._kind_of(run)
        if kind is None or kind not in options:
            return False
        key = (id(options), kind)
        if key not in self._needs:
            self._needs[key] = (options[kind].devices, gib(options[kind].need))
        return self._needs[key] == (run.tp, run.need_gib)

    def _kind_of(self, run: Placement) -> int | None:
        """The kind of its devices, None where its node has them no more."""
        form = self._forms.get(run.node)
        if form is None:
            return None
        at = self._kinds[form].at
        found = at.get((run.cards[0], run.mode))
        if found is None or any(at.get((card, run.mode), _NONE)[0] != found[0] for card in run.cards[1:]):
            return None
        return found[0]

    def _mattering(self, fleet: Fleet, previous: Plan) -> Iterable[FleetNode]:
        used: Counter[str] = Counter()
        for runs in self.placements.values():
            for run in runs:
                used[run.node] += run.tp
        named = {run.node for run in previous.placements if run.workload not in self.placements}
        named |= {each.pinned.node for each in self.workloads.workloads if each.pinned}
        seen: set[_Form] = set()
        for node in fleet.nodes:
            form = self._forms[node.name]
            if node.name in named or form not in seen or used[node.name] < self._kinds[form].devices:
                seen.add(form)
                yield node

    def occupied(self, nodes: Iterable[PlanNode]) -> tuple[Occupied, ...]:
        """The devices of these nodes on which they stand."""
        numbers = {node.name: node.number for node in nodes}
        found = []
        for runs in self.placements.values():
            for run in runs:
                if (number := numbers.get(run.node)) is not None:
                    at = self._kinds[self._forms[run.node]].at
                    devices = tuple((at[card, run.mode][1], partition) for card, partition in run.devices)
                    found.append(Occupied(number, devices))
        return tuple(found)

    def standing(self, workloads: Workloads, nodes: Iterable[PlanNode]) -> Standing:
        """How many of each level and priority stand on each kind of device, in the kinds' numbers on these nodes."""
        by_form = {self._forms[node.name]: node for node in nodes}
        counts: Counter[tuple[_Form, int, str, int, str]] = Counter()
        for workload in workloads.workloads:
            level = own_level(workload)
            for run in self.placements.get(workload.name, ()):
                counts[self._forms[run.node], run.cards[0], run.mode, level, workload.priority] += 1
        found: Standing = Counter()
        for (form, card, mode, level, priority), count in counts.items():
            position = self._kinds[form].at[card, mode][1]
            found[by_form[form].cards[position].kinds[mode], level, priority] += count
        return found


def _form(node: FleetNode) -> _Form:
    return (node.gpu, node.deployment, id(node.cards), node.labels)


def _kind(node: FleetNode, planned: PlanNode, kinds: tuple[DeviceKind, ...]) -> _Kind:
    at = {
        (card.number, card.current or ""): (card.as_found, position)
        for position, card in enumerate(planned.cards)
        if card.as_found >= 0
    }
    # A node whose cards are not usable as they are is not full: its modes may change.
    devices = sum(kinds[kind].partitions for kind, _ in at.values()) if len(at) == len(planned.cards) else 1 << 30
    return _Kind(node, at, devices)


def _is_free(workload: Workload) -> bool:
    """Whether nothing binds it to others or to a place; those who share a device are bound to each other."""
    bound = workload.pinned or workload.affinity or workload.anti_affinity or workload.spread
    return not bound and workload.memory_limit is None


def _is_as_asked(run: Placement, workload: Workload) -> bool:
    return not run.fallback and (
        (run.kind, run.priority, run.slo, run.model, run.precision, run.context, run.concurrency)
        == (
            workload.kind,
            workload.priority,
            workload.tuned_for,
            workload.sized_by,
            workload.precision,
            workload.context,
            workload.concurrency,
        )
    )


def in_the_modes_of(fleet: Fleet, plan: Plan) -> Fleet:
    """The fleet as it is once that plan was carried out: each card in the mode that the plan gave it, and one that the
    plan does not know in the one that most cards of its node have: cards in several memory modes would be of no use.
    """
    planned = {(card.node, card.card): (card.gpu, card.mode) for card in plan.cards}
    usual: dict[str, Counter[tuple[str, str | None]]] = {}
    for known_card in plan.cards:
        usual.setdefault(known_card.node, Counter())[known_card.gpu, known_card.mode] += 1
    modes_of: dict[tuple[object, ...], int] = {}
    known: dict[int, int] = {}
    made: dict[object, tuple[FleetCard, ...]] = {}
    nodes = []
    for node in fleet.nodes:
        cards = []
        for card in node.cards:
            if id(card.modes) not in known:
                known[id(card.modes)] = modes_of.setdefault(_value(card), len(modes_of))
            gpu, mode = planned.get((node.name, card.index)) or _most(usual.get(node.name, Counter()))
            current = mode if gpu == node.gpu and mode and card.mode(mode) else card.current
            cards.append((card.index, current, card.hive, card.device_mib, known[id(card.modes)]))
        # Nodes that are alike share their cards: the planner looks at them once.
        key = (node.gpu, *cards)
        if key not in made:
            made[key] = tuple(_in_mode(card, new[1]) for card, new in zip(node.cards, cards, strict=True))
        nodes.append(replace(node, cards=made[key]))
    return replace(fleet, nodes=tuple(nodes))


def _most(modes: Counter[tuple[str, str | None]]) -> tuple[str, str | None]:
    """The first of the most frequent."""
    return next((mode for mode, _ in modes.most_common(1)), ("", None))


def _value(card: FleetCard) -> tuple[object, ...]:
    return tuple((mode.label, mode.tier, mode.partitions, mode.memory_mib) for mode in card.modes)


def _in_mode(card: FleetCard, mode: str | None) -> FleetCard:
    # What its devices report in one mode says nothing of another.
    return card if card.current == mode else replace(card, current=mode, device_mib=None)
