"""The planner's problem in small numbers: kinds of devices, nodes, jobs, and how many devices each job takes where.

Sizes are exact bytes (sizing.demand); nothing here decides anything. A *bin* is where replicas stand side by side: a
partitioned card (capacity: its partitions), or the whole cards of one hive of a node (capacity: the cards).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .errors import AimProfileError, SizingError
from .facts import ModelFacts
from .fleet import Fleet, FleetCard, FleetNode
from .gpu import PartitionMode, Tier, catalog
from .model import load_model
from .plan import PRIORITIES, Placement, PlanOptions
from .sizing import DEFAULT_UTILIZATION, Request, budget_bytes, demand
from .units import parse_memory
from .workload import Workload, WorkloadError, Workloads

# Objective levels of placing: each priority, first what serves, then what fills the gaps.
LEVELS = 2 * len(PRIORITIES)


Selector = tuple[tuple[str, str], ...]


class DeviceKind(NamedTuple):
    """Devices that are alike: one mode of one accelerator with one size, on nodes that the same selectors choose.

    partitions: devices per card; selected: the node selectors (sorted label pairs) that choose these nodes.
    """

    number: int
    gpu: str
    mode: PartitionMode
    partitions: int
    device_bytes: int
    selected: frozenset[Selector]

    @property
    def whole(self) -> bool:
        """Whether a device is a whole card."""
        return self.partitions == 1


class Option(NamedTuple):
    """How a job runs on one kind: devices per replica, bytes needed and allowed on each."""

    devices: int
    need: int
    budget: int


class PlanCard(NamedTuple):
    """One card. number: its index on the node; kinds: by mode label; as_found: the kind it is in, -1: unusable so."""

    number: int
    hive: int
    current: str | None
    kinds: Mapping[str, int]
    as_found: int


class PlanNode(NamedTuple):
    """One node. labels: modes every card can take; alike: nodes of one number are interchangeable."""

    number: int
    name: str
    cards: tuple[PlanCard, ...]
    labels: tuple[str, ...]
    alike: int


@dataclass(frozen=True, eq=False)
class Job:
    """One workload. own_level: where it counts; level: when it is placed (that of its most urgent dependent).

    options: by kind index; shape: equal for jobs that take the same everywhere; rank: targets of an affinity before
    those who depend on them; limit: bytes it takes of a shared device, None: it has its devices alone; size: the least
    share of a card that a replica takes.
    """

    index: int
    workload: Workload
    options: Mapping[int, Option]
    own_level: int
    level: int
    rank: int
    shape: int
    pin: tuple[int, int | None, int | None] | None
    affinity: tuple[int, ...]
    anti_affinity: tuple[int, ...]
    limit: int | None
    size: float

    @cached_property
    def constrained(self) -> bool:
        """Whether it matters which node or card it gets."""
        return bool(self.pin or self.affinity or self.anti_affinity or self.workload.spread is not None)


class Running(NamedTuple):
    """A replica that runs now: its job, number, node and (card position, partition) devices."""

    job: int
    replica: int
    node: int
    devices: tuple[tuple[int, int], ...]
    fixed: bool


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything a planner needs. jobs and nodes are in order of their names."""

    kinds: tuple[DeviceKind, ...]
    nodes: tuple[PlanNode, ...]
    jobs: tuple[Job, ...]
    running: tuple[Running, ...]
    mixed: bool
    effort: int

    @cached_property
    def replicas(self) -> int:
        """Replicas of all jobs."""
        return sum(job.workload.replicas for job in self.jobs)


def make_problem(
    fleet: Fleet, workloads: Workloads, options: PlanOptions, current: tuple[Placement, ...] = ()
) -> Problem:
    """The problem of placing `workloads` on `fleet`, with what runs there now.

    Raises WorkloadError naming the workload whose model, node or numbers cannot be used.
    """
    selectors = {_selector(w) for w in workloads.workloads}
    kinds, nodes = _nodes(fleet, options, selectors)
    jobs = _Jobs(kinds, nodes, fleet).of(workloads)
    running = _running(current, jobs, nodes, kinds, options.allow_eviction)
    return Problem(kinds, nodes, jobs, running, options.allow_mixed_compute, options.effort)


# --- devices ------------------------------------------------------------------------------------------------------


_Kinds = dict[tuple[str, str, int, frozenset[Selector]], DeviceKind]


def _selector(workload: Workload) -> Selector:
    return tuple(sorted(workload.node_selector.items()))


def _nodes(
    fleet: Fleet, options: PlanOptions, selectors: set[Selector]
) -> tuple[tuple[DeviceKind, ...], tuple[PlanNode, ...]]:
    kinds: _Kinds = {}
    built: dict[object, tuple[tuple[PlanCard, ...], tuple[str, ...]]] = {}
    alike: dict[object, int] = {}
    nodes: list[PlanNode] = []
    for index, node in enumerate(fleet.nodes):
        selected = frozenset(wanted for wanted in selectors if set(wanted) <= set(node.labels))
        form = (node.gpu, node.deployment, id(node.cards), selected)
        if form not in built:
            built[form] = _cards(node, kinds, options, selected)
        cards, labels = built[form]
        same = tuple((c.hive, c.current, c.as_found, tuple(c.kinds.items())) for c in cards)
        nodes.append(PlanNode(index, node.name, cards, labels, alike.setdefault((same, labels), len(alike))))
    return tuple(kinds.values()), tuple(nodes)


def _cards(
    node: FleetNode, kinds: _Kinds, options: PlanOptions, selected: frozenset[Selector]
) -> tuple[tuple[PlanCard, ...], tuple[str, ...]]:
    by_card = [_kinds_of(card, node, kinds, options.tier, selected) for card in node.cards]
    labels = tuple(label for label in by_card[0] if all(label in found for found in by_card))
    current = {card.current for card in node.cards}
    memories = {label.split("/")[1] for label in current if label}
    usable = len(memories) == 1 and (options.allow_mixed_compute or len(current) == 1)
    cards = tuple(
        PlanCard(card.index, card.hive, card.current, found, found.get(card.current or "", -1) if usable else -1)
        for card, found in zip(node.cards, by_card, strict=True)
    )
    return cards, labels if node.switchable else ()


def _kinds_of(
    card: FleetCard, node: FleetNode, kinds: _Kinds, tier: Tier, selected: frozenset[Selector]
) -> dict[str, int]:
    found = {}
    for mode in card.allowed(tier, node.switchable):
        key = (node.gpu, mode.label, mode.memory_bytes, selected)
        kind = DeviceKind(len(kinds), node.gpu, mode, mode.partitions, mode.memory_bytes, selected)
        found[mode.label] = kinds.setdefault(key, kind).number
    return found


# --- jobs ---------------------------------------------------------------------------------------------------------


class _Jobs:
    """Workloads as jobs. Sizes are computed once for workloads that ask the same."""

    def __init__(self, kinds: tuple[DeviceKind, ...], nodes: tuple[PlanNode, ...], fleet: Fleet) -> None:
        self._kinds = kinds
        self._nodes = {node.name: node for node in nodes}
        self._most_cards = most_whole_cards(fleet)
        self._sizes: dict[tuple[object, ...], Mapping[int, Option]] = {}
        self._shapes: dict[object, int] = {}
        self._models: dict[str, ModelFacts] = {}

    def of(self, workloads: Workloads) -> tuple[Job, ...]:
        ordered = sorted(workloads.workloads, key=lambda w: w.name)
        index = {workload.name: at for at, workload in enumerate(ordered)}
        levels, ranks = _urgency(ordered, index)
        against: dict[int, set[int]] = {}
        for at, workload in enumerate(ordered):
            for other in workload.anti_affinity:
                against.setdefault(at, set()).add(index[other])
                against.setdefault(index[other], set()).add(at)
        return tuple(
            Job(
                index=at,
                workload=workload,
                options=(options := self._options(workload)),
                own_level=own_level(workload),
                level=levels[at],
                rank=ranks[at],
                shape=self._shape(workload, options),
                pin=self._pin(workload),
                affinity=tuple(sorted(index[name] for name in workload.affinity)),
                anti_affinity=tuple(sorted(against.get(at, ()))),
                limit=parse_memory(workload.memory_limit) if workload.shares and workload.memory_limit else None,
                size=min((cards_taken(o, self._kinds[k]) for k, o in options.items()), default=0.0),
            )
            for at, workload in enumerate(ordered)
        )

    def _shape(self, workload: Workload, options: Mapping[int, Option]) -> int:
        key = (*((k, o.devices) for k, o in options.items()), workload.memory_limit if workload.shares else None)
        return self._shapes.setdefault(key, len(self._shapes))

    def _options(self, workload: Workload) -> Mapping[int, Option]:
        asked = workload
        key = (
            *(asked.model, asked.precision, asked.context, asked.concurrency, asked.kv_dtype, asked.lora_slots),
            *(asked.lora_rank, asked.memory, asked.memory_limit, asked.tp, asked.slo, asked.shares),
            *(
                bool(asked.pinned and asked.pinned.card is not None),
                bool(asked.pinned and asked.pinned.partition is not None),
            ),
            _selector(workload),
        )
        if key not in self._sizes:
            try:
                self._sizes[key] = self._size(workload)
            except AimProfileError as problem:
                raise WorkloadError(
                    f"workload {workload.name}: {problem.problem}",
                    field=f"{workload.name}.{problem.field}",
                    value=problem.value,
                    remedy=problem.remedy,
                ) from problem
        return self._sizes[key]

    def _size(self, workload: Workload) -> dict[int, Option]:
        wanted = _selector(workload)
        needs: dict[int, int | None] = {}
        found: dict[int, Option] = {}
        for kind in self._kinds:
            if wanted in kind.selected and self._computes(workload, kind):
                option = self._option(workload, kind, needs)
                found |= {kind.number: option} if option else {}
        return found

    def _option(self, workload: Workload, kind: DeviceKind, needs: dict[int, int | None]) -> Option | None:
        """The fewest devices of that kind that hold a replica, None where no number does."""
        budget = budget_bytes(kind.device_bytes, DEFAULT_UTILIZATION)
        if workload.memory_limit is not None:
            limit = parse_memory(workload.memory_limit)
            if limit > budget:
                return None
            budget = limit
        for devices in device_counts(workload, kind, self._most_cards[kind.gpu]):
            if devices not in needs:
                needs[devices] = need_bytes(workload, devices, self._facts(workload))
            need = needs[devices]
            if need is not None and need <= budget:
                return Option(devices, need, budget)
        return None

    def _facts(self, workload: Workload) -> ModelFacts | None:
        return None if workload.model is None else self._model(workload.model)

    def _model(self, reference: str) -> ModelFacts:
        if reference not in self._models:
            self._models[reference] = load_model(reference)
        return self._models[reference]

    def _computes(self, workload: Workload, kind: DeviceKind) -> bool:
        """fp8 needs matrix units that know it; every other format is computed in 16 bit where it must be."""
        if workload.model is None:
            return True
        precision = workload.precision or self._model(workload.model).native_precision
        formats = catalog()[kind.gpu].matrix_formats
        return precision != "fp8" or any(name.startswith("fp8") for name in formats)

    def _pin(self, workload: Workload) -> tuple[int, int | None, int | None] | None:
        pin = workload.pinned
        if pin is None:
            return None
        node = self._nodes.get(pin.node)
        if node is None:
            raise WorkloadError(
                f"workload {workload.name}: pinned.node: the fleet has no node {pin.node!r}",
                field=f"{workload.name}.pinned.node",
                value=pin.node,
            )
        position = next((at for at, card in enumerate(node.cards) if card.number == pin.card), None)
        if pin.card is not None and position is None:
            raise WorkloadError(
                f"workload {workload.name}: pinned.card: node {pin.node} has no card {pin.card}",
                field=f"{workload.name}.pinned.card",
                value=pin.card,
                remedy=f"its cards are {node.cards[0].number} to {node.cards[-1].number}",
            )
        return node.number, position, pin.partition


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


def own_level(workload: Workload) -> int:
    """0 (high, serving) to 5 (low, filling gaps)."""
    return 2 * PRIORITIES.index(workload.priority) + (workload.kind != "serve")


def _urgency(workloads: list[Workload], index: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Level and rank of each: the target of an affinity is as urgent as who depends on it, and comes first."""
    levels = [own_level(workload) for workload in workloads]
    ranks = [0] * len(workloads)
    stack = [at for at, workload in enumerate(workloads) if workload.affinity]
    while stack:
        at = stack.pop()
        for target in (index[name] for name in workloads[at].affinity):
            level, rank = min(levels[target], levels[at]), min(ranks[target], ranks[at] - 1)
            if (level, rank) != (levels[target], ranks[target]):
                levels[target], ranks[target] = level, rank
                stack.append(target)
    return levels, ranks


# --- what runs now ------------------------------------------------------------------------------------------------


def _running(
    placements: tuple[Placement, ...],
    jobs: tuple[Job, ...],
    nodes: tuple[PlanNode, ...],
    kinds: tuple[DeviceKind, ...],
    eviction: bool,
) -> tuple[Running, ...]:
    """Running replicas that may stay: their workload is still asked for and still fits where it is."""
    by_name = {job.workload.name: job for job in jobs}
    by_node = {node.name: node for node in nodes}
    kept = []
    for placement in placements:
        job, node = by_name.get(placement.workload), by_node.get(placement.node)
        if job is None or node is None or placement.replica >= job.workload.replicas:
            continue
        positions = {card.number: at for at, card in enumerate(node.cards)}
        if not all(card in positions for card in placement.cards):
            continue
        if all(_still_fits(job, placement, node.cards[positions[card]], kinds) for card in placement.cards):
            devices = tuple((positions[card], partition) for card, partition in placement.devices)
            fixed = not (eviction and job.workload.may_be_evicted)
            kept.append(Running(job.index, placement.replica, node.number, devices, fixed))
    return tuple(sorted(_held_by_dependents(kept, jobs)))


def _held_by_dependents(running: list[Running], jobs: tuple[Job, ...]) -> list[Running]:
    """What a replica that stays must stand beside stays too, even where it could be evicted by itself."""
    found = list(running)
    while True:
        needed = {(target, run.node) for run in found if run.fixed for target in jobs[run.job].affinity}
        held = [run._replace(fixed=run.fixed or (run.job, run.node) in needed) for run in found]
        if held == found:
            return held
        found = held


def _still_fits(job: Job, placement: Placement, card: PlanCard, kinds: tuple[DeviceKind, ...]) -> bool:
    kind = card.kinds.get(placement.mode, -1)
    option = job.options.get(kind)
    if card.current != placement.mode or option is None or option.devices != placement.tp:
        return False
    return all(partition < kinds[kind].partitions for partition in placement.partitions)
