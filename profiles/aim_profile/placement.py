"""The default planner: fast, deterministic, and for small fleets thorough.

Construct: level by level, in the modes as found; what does not fit switches the empty node (or, with mixed modes, the
empty card) that then takes most. A few strategies compete; the best score wins. Improve: where the fleet is small
enough for `effort`, other modes are tried, all of them or the neighbours of the best so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations_with_replacement, product
from math import ceil, comb, prod
from random import Random
from typing import NamedTuple

from .plan_problem import LEVELS, Job, PlanNode, Problem, Running
from .plan_sketch import Modes, Sketch, take
from .plan_state import Bin, Found, Score, State, slot_of, switching


class Strategy(NamedTuple):
    """large_first: order within a level; fraction_first: a small share of a card before a card in use; dense: switch
    what takes most, not what costs least; lenient: pinned and running replicas first, whatever their priority; seed:
    of the chance that disturbs order and preference, 0: none.
    """

    large_first: bool = True
    fraction_first: bool = False
    dense: bool = False
    lenient: bool = True
    seed: int = 0


_STRATEGIES = (
    Strategy(),
    Strategy(lenient=False),
    Strategy(dense=True),
    Strategy(large_first=False),
    Strategy(fraction_first=True),
    Strategy(fraction_first=True, dense=True),
    Strategy(large_first=False, dense=True, lenient=False),
)
_FILLS = (Strategy(), Strategy(fraction_first=True), Strategy(large_first=False), Strategy(lenient=False))
_ELITE = 8
_NODES_TO_TRY = 32


def solve(problem: Problem) -> State:
    """The best placement found. Deterministic: bounded by problem.effort (replicas examined), never by time."""
    cost = problem.replicas + sum(len(node.cards) for node in problem.nodes) + 1
    tries = max(1, problem.effort // cost)
    starts = Sketch(problem).starts()
    if {} not in starts:
        starts.append({})
    lenient_only = not _leniency_matters(problem)
    best: State | None = None
    for strategy, start in product(_STRATEGIES, starts):
        if best is not None and is_best(best):
            break
        # The strict strategy always gets its turn where it matters: a pin never outranks a priority.
        if (tries > 0 or strategy == _STRATEGIES[1]) and (strategy.lenient or not lenient_only):
            tries -= 1
            state = _Builder(problem, strategy, start, may_switch=True).build()
            best = state if best is None or state.score() < best.score() else best
    assert best is not None
    return _improve(problem, best, tries)


def is_best(state: State) -> bool:
    """Whether no placement can be better: everything placed, nothing switched or moved, no fewer cards possible."""
    problem = state.problem
    everything = sum(state.placed) == problem.replicas
    nothing_moved = state.changes() == (0, 0) and state.stay == len(problem.running)
    return everything and nothing_moved and state.cards_used == cards_bound(state)


def cards_bound(state: State) -> int:
    """Fewest cards any placement of the same replicas needs that changes no more modes than this one.

    Each replica takes at least its smallest share of a card over the kinds it could get; without a change only kinds
    as found are there.
    """
    problem = state.problem
    found = {card.as_found for node in problem.nodes for card in node.cards}
    kinds = found if state.changes() == (0, 0) else set(range(len(problem.kinds)))
    total = 0.0
    for job in problem.jobs:
        if state.count[job.index]:
            total += state.count[job.index] * _least_share(job, problem, kinds)
    return ceil(total - 1e-6)


def _least_share(job: Job, problem: Problem, kinds: set[int]) -> float:
    """Shared devices count by bytes: limit of budget."""
    shares = []
    for kind, option in job.options.items():
        if kind in kinds:
            whole = option.devices / problem.kinds[kind].partitions
            budget = problem.kinds[kind].device_bytes * 0.9
            shares.append(whole if job.limit is None else whole * min(1.0, job.limit / budget))
    return min(shares, default=0.0)


def _leniency_matters(problem: Problem) -> bool:
    return any(not running.fixed for running in problem.running) or any(job.pin for job in problem.jobs)


# --- construct ----------------------------------------------------------------------------------------------------


class _Builder:
    """One construction, from `modes` (nodes left out: as found). may_switch: whether empty nodes may follow."""

    def __init__(self, problem: Problem, strategy: Strategy, modes: Modes, may_switch: bool) -> None:
        self.problem, self.strategy, self.may_switch = problem, strategy, may_switch
        chance = Random(strategy.seed) if strategy.seed else None
        # Only sizes are disturbed, and by a factor: what comes first should mostly still come first.
        self.weight = [job.size * (chance.choice((0.3, 1.0, 3.0)) if chance else 1.0) for job in problem.jobs]
        self.state = State(problem, modes, strategy.fraction_first, chance)
        self.left = [job.workload.replicas for job in problem.jobs]
        self.running: dict[int, list[Running]] = {}

    def build(self) -> State:
        self._keep_running()
        if self.strategy.lenient:
            for job in sorted(self.problem.jobs, key=lambda job: (job.own_level, job.rank, job.index)):
                if job.pin is not None and not job.affinity:
                    self._place_special(job)
        for level in range(LEVELS):
            self._fill_level(level)
        return self.state

    def _keep_running(self) -> None:
        """Fixed ones first; the others now (lenient) or when their level comes."""
        for running in sorted(self.problem.running, key=lambda r: (not r.fixed, self.problem.jobs[r.job].rank, r)):
            if running.fixed or self.strategy.lenient:
                self._stay(running)
            else:
                self.running.setdefault(running.job, []).append(running)

    def _stay(self, running: Running) -> bool:
        """Leave a running replica where it is, if its devices are free and its constraints hold."""
        job = self.problem.jobs[running.job]
        for bin_ in self.state.of_node[running.node]:
            if running.devices[0][0] in bin_.cards:
                found = self._as_it_runs(job, bin_, running)
                if found is not None and self.left[job.index]:
                    self.state.place(job, found, running)
                    self.left[job.index] -= 1
                    return True
        return False

    def _as_it_runs(self, job: Job, bin_: Bin, running: Running) -> Found | None:
        node = self.problem.nodes[running.node]
        same = all(self.state.label[node.number][card] == node.cards[card].current for card, _ in running.devices)
        if (
            not same
            or bin_.kind.number not in job.options
            or not all(card in bin_.cards for card, _ in running.devices)
        ):
            return None
        slots = [slot_of(bin_, device) for device in running.devices]
        shared = self.state.shared_at(bin_, slots[0]) if job.limit is not None else None
        if job.pin is not None and self.state.pinned_slot(job, bin_) not in (None, slots[0]):
            return None
        if (job.pin is not None and job.pin[0] != running.node) or not self.state.allows(job, bin_, shared):
            return None
        if shared is not None:
            return Found(bin_, shared) if job.limit is not None and shared.left >= job.limit else None
        return None if bin_.taken.intersection(slots) else Found(bin_)

    # One level: first what cares where it stands, then the rest, large before small.

    def _fill_level(self, level: int) -> None:
        self._place_targets(level)
        jobs = [job for job in self.problem.jobs if job.own_level == level and self.left[job.index]]
        for job in jobs:
            self._back_home(job)
        shapes: dict[int, list[Job]] = {}
        for job in jobs:
            # What cares where it stands is a shape of its own.
            shapes.setdefault(-1 - job.index if job.constrained else job.shape, []).append(job)
        ordered = sorted(shapes.values(), key=lambda same: self._turn(same[0]))
        for _ in range(1 + any(job.affinity for job in jobs)):
            for same in ordered:
                if same[0].constrained:
                    self._place_special(same[0])
                else:
                    self._fill([same])
        if self.may_switch:
            self._switch_for([same for same in ordered if not same[0].constrained], level)

    def _turn(self, job: Job) -> tuple[float, ...]:
        """Whose turn it is within a level: those who care where they stand, large before small; or by size alone."""
        weight = self.weight[job.index]
        if self.strategy.large_first:
            picky = job.constrained and not self.strategy.seed % 2
            return (not picky, job.rank if picky else 0, job.pin is None, -weight, len(job.options), job.index)
        return (weight, job.rank, job.pin is None, len(job.options), job.index)

    def _place_targets(self, level: int) -> None:
        """One replica of each workload that one of this level must stand beside, less urgent ones included."""
        targets = [job for job in self.problem.jobs if job.rank < 0 and job.level == level]
        for job in sorted(targets, key=lambda job: (job.rank, job.index)):
            if not self.state.count[job.index]:
                self._place_special(job, 1)

    def _back_home(self, job: Job) -> None:
        for running in self.running.pop(job.index, ()):
            self._stay(running)

    def _place_special(self, job: Job, most: int = 1 << 30) -> None:
        while self.left[job.index] and (most := most - 1) >= 0:
            found = self.state.find(job)
            if found is None and (self._bring_target(job) or (self.may_switch and self._switch_for_one(job))):
                found = self.state.find(job)
            if found is None:
                return
            self.state.place(job, found)
            self.left[job.index] -= 1

    def _bring_target(self, job: Job) -> bool:
        """Place one more replica of the workload `job` must stand beside, where there is room for both."""
        if len(job.affinity) != 1 or not self.left[job.affinity[0]]:
            return False
        target = self.problem.jobs[job.affinity[0]]
        nodes = self.problem.nodes if target.pin is None else (self.problem.nodes[target.pin[0]],)
        for node in nodes[:_NODES_TO_TRY]:
            found = self.state.find_on(target, (node.number,))
            if found is None:
                continue
            held = self.state.place(target, found)
            if self.state.find(job) is not None:
                self.left[target.index] -= 1
                return True
            self.state.remove(found.bin, held)
        return False

    def _fill(self, shapes: list[list[Job]]) -> None:
        """Place all that fits. Jobs of one shape fit alike: the first failure ends the shape."""
        for same in shapes:
            last: Found | None = None
            for job in same:
                while self.left[job.index] and (last := self._still_best(job, last) or self.state.find(job)):
                    self.state.place(job, last)
                    self.left[job.index] -= 1
                if self.left[job.index]:
                    break

    def _still_best(self, job: Job, last: Found | None) -> Found | None:
        """The bin the last replica of this shape took, while there is room: it got fuller, so none is better."""
        if last is None or job.limit is not None or self.strategy.seed:
            return None
        return last if last.bin.free >= job.options[last.bin.kind.number].devices else None

    # Switching modes.

    def _switch_for_one(self, job: Job) -> bool:
        """Switch the cheapest empty node so that one more replica of `job` fits; False where none would do."""
        best: tuple[tuple[int, ...], PlanNode, tuple[str, ...]] | None = None
        for node in self._switchable(job):
            for labels in self._modes_of(node):
                if labels == tuple(self.state.label[node.number]) or not self._would_hold(job, node, labels):
                    continue
                cost = (*switching(labels, [card.current for card in node.cards]), node.number)
                if best is None or cost < best[0]:
                    best = (cost, node, labels)
        if best is None:
            return False
        self.state.switch(best[1].number, best[2])
        return True

    def _switchable(self, job: Job) -> Iterator[PlanNode]:
        nodes = (self.problem.nodes[job.pin[0]],) if job.pin else self.problem.nodes
        seen: set[tuple[int, tuple[str | None, ...]]] = set()
        for node in nodes:
            key = (node.alike, tuple(self.state.label[node.number]))
            if not self.state.touched[node.number] and node.labels and key not in seen:
                seen.add(key)
                yield node

    def _would_hold(self, job: Job, node: PlanNode, labels: tuple[str, ...]) -> bool:
        if job.affinity:
            return False  # its node must hold a replica already, and such a node is not switched
        kinds = Counter((card.kinds[label], card.hive) for card, label in zip(node.cards, labels, strict=True))
        position = job.pin[1] if job.pin else None
        for (kind, hive), cards in kinds.items():
            option = job.options.get(kind)
            if option is None or (position is not None and node.cards[position].hive != hive):
                continue
            partition = (job.pin[2] if job.pin else None) or 0
            if partition < self.problem.kinds[kind].partitions:
                return option.devices <= (
                    cards if self.problem.kinds[kind].whole else self.problem.kinds[kind].partitions
                )
        return False

    def _modes_of(self, node: PlanNode) -> Iterator[tuple[str, ...]]:
        for label in node.labels:
            yield (label,) * len(node.cards)

    def _switch_for(self, shapes: list[list[Job]], level: int) -> None:
        """Switch empty nodes, each time the one that helps most, until nothing is left or nothing helps."""
        if not any(self.left[job.index] for same in shapes for job in same):
            return
        lower = self._lower(level)
        while any(self.left[job.index] for same in shapes for job in same):
            waiting = [(same[0], sum(self.left[job.index] for job in same)) for same in shapes]
            choice = self._best_switch([(job, count) for job, count in waiting if count], lower)
            if choice is None:
                return
            choice.apply(self.state)
            self._fill(shapes)

    def _lower(self, level: int) -> list[tuple[Job, int]]:
        """What later levels will want, by shape."""
        counts: Counter[int] = Counter()
        example: dict[int, Job] = {}
        for job in self.problem.jobs:
            if job.own_level > level and not job.constrained:
                counts[job.shape] += job.workload.replicas
                example.setdefault(job.shape, job)
        return [(example[shape], count) for shape, count in counts.items()]

    def _best_switch(self, waiting: list[tuple[Job, int]], lower: list[tuple[Job, int]]) -> _Switch | None:
        best: tuple[tuple[float, ...], _Switch] | None = None
        for switch in self._switches():
            slots = _slots(self.problem, switch)
            placed = take(list(waiting), slots)
            if not placed:
                continue
            drained, switched = switch.cost(self.state)
            value = (-placed, drained) if self.strategy.dense else (drained, -placed)
            rank = (*value, switched, -take(list(lower), slots), switch.node.number, *(switch.positions or ()))
            if best is None or rank < best[0]:
                best = (rank, switch)
        return None if best is None else best[1]

    def _switches(self) -> Iterator[_Switch]:
        """Every switch of an empty node, one for nodes that are alike; with mixed modes also of empty cards."""
        seen: set[object] = set()
        for node in self.problem.nodes:
            now = tuple(self.state.label[node.number])
            if not node.labels:
                continue
            if not self.state.touched[node.number] and (node.alike, now) not in seen:
                seen.add((node.alike, now))
                for labels in self._modes_of(node):
                    if labels != now:
                        yield _Switch(node, labels[0], None)
            if self.problem.mixed:
                yield from self._card_switches(node, now)

    def _card_switches(self, node: PlanNode, now: tuple[str | None, ...]) -> Iterator[_Switch]:
        """Empty cards of one node into another compute mode of the memory mode it is in."""
        empty = _empty_cards(self.state, node)
        memory = {label.split("/")[1] for label in now if label}
        for label in node.labels:
            cards = tuple(at for at in empty if now[at] != label)
            if memory != {label.split("/")[1]} or not cards:
                continue
            for number in (1, 2, 4, 8):
                if number <= len(cards) and (number == 1 or label.startswith("SPX")):
                    yield _Switch(node, label, cards[:number])


class _Switch(NamedTuple):
    """Cards of one node into one mode; positions None: all of them."""

    node: PlanNode
    label: str
    positions: tuple[int, ...] | None

    def apply(self, state: State) -> None:
        if self.positions is None:
            state.switch(self.node.number, (self.label,) * len(self.node.cards))
        else:
            for position in self.positions:
                state.switch_card(self.node.number, position, self.label)

    def cost(self, state: State) -> tuple[int, int]:
        """(nodes drained, cards switched)."""
        labels = list(state.label[self.node.number])
        for at in range(len(labels)) if self.positions is None else self.positions:
            labels[at] = self.label
        before = switching(state.label[self.node.number], [c.current for c in self.node.cards])
        after = switching(labels, [card.current for card in self.node.cards])
        return after if self.positions is None else (after[0] - before[0], after[1] - before[1])


def _empty_cards(state: State, node: PlanNode) -> list[int]:
    used = {bin_.device(slot)[0] for bin_ in state.of_node[node.number] for slot in bin_.taken}
    return [at for at in range(len(node.cards)) if at not in used]


def _slots(problem: Problem, switch: _Switch) -> Counter[int]:
    """Devices by kind that a switch makes."""
    slots: Counter[int] = Counter()
    cards = switch.node.cards
    for card in cards if switch.positions is None else (cards[at] for at in switch.positions):
        kind = card.kinds[switch.label]
        slots[kind] += problem.kinds[kind].partitions
    return slots


# --- improve ------------------------------------------------------------------------------------------------------


def fill(problem: Problem, modes: Modes, strategy: Strategy) -> State:
    """The placement in given modes; nodes left out are as found, and nothing is switched."""
    return _Builder(problem, strategy, modes, may_switch=False).build()


def _improve(problem: Problem, best: State, tries: int) -> State:
    """Try other modes, all of them where half of `tries` suffices; then chance, in and around the best modes."""
    if tries <= 0:
        return best
    search = _Search(problem, best)
    groups = _groups(problem)
    ways = prod(comb(len(group) + len(group[0].labels), len(group)) for group in groups)
    if ways <= tries // 2 and not problem.mixed:
        every = [_merged(choice) for choice in product(*(list(_choices(group)) for group in groups))]
        fills = _FILLS[: max(1, tries // 2 // ways)]
        for modes, strategy in product(every, fills):
            search.attempt(modes, strategy)
        tries -= len(every) * len(fills)
    search.wander(tries)
    return search.best


class _Search:
    """The best placement so far, and the modes worth another look."""

    def __init__(self, problem: Problem, best: State) -> None:
        self.problem, self.best, self.score = problem, best, best.score()
        self.elite: list[tuple[Score, tuple[tuple[int, tuple[str, ...]], ...]]] = []
        self._remember(self.score, _modes_in(problem, best))

    def attempt(self, modes: Modes, strategy: Strategy) -> None:
        """Fill these modes; keep what is better."""
        state = fill(self.problem, modes, strategy)
        score = state.score()
        if score < self.score:
            self.best, self.score = state, score
        if score <= self.elite[-1][0] or len(self.elite) < _ELITE:
            self._remember(score, modes)

    def _remember(self, score: Score, modes: Modes) -> None:
        key = tuple(sorted(modes.items()))
        self.elite = [entry for entry in self.elite if entry[1] != key or entry[0] < score]
        if all(entry[1] != key for entry in self.elite):
            self.elite = sorted([*self.elite, (score, key)])[:_ELITE]

    def wander(self, tries: int) -> None:
        """Disturb order and preference; now and then one node or card is in another mode. Seeded: always the same."""
        chance = Random(1)
        for seed in range(1, tries + 1):
            modes = dict(self.elite[min(chance.randrange(_ELITE), chance.randrange(_ELITE)) % len(self.elite)][1])
            if modes and chance.random() < 0.25:
                del modes[chance.choice(sorted(modes))]  # most switches that can be spared are found so
            elif chance.random() < 0.5:
                modes = _neighbour(self.problem, modes, chance)
            strategy = Strategy(
                large_first=chance.random() < 0.6,
                fraction_first=chance.random() < 0.5,
                lenient=chance.random() < 0.7,
                seed=seed if chance.random() < 0.8 else 0,
            )
            self.attempt(modes, strategy)
            if is_best(self.best):
                return


def _groups(problem: Problem) -> list[list[PlanNode]]:
    """Nodes that may be switched, those together that are interchangeable (nothing pinned to or running on them)."""
    named = {job.pin[0] for job in problem.jobs if job.pin} | {running.node for running in problem.running}
    busy = {running.node for running in problem.running if running.fixed}
    groups: dict[object, list[PlanNode]] = {}
    for node in problem.nodes:
        if node.labels and node.number not in busy:
            key = (node.alike, node.number if node.number in named else -1)
            groups.setdefault(key, []).append(node)
    return list(groups.values())


def _choices(group: list[PlanNode]) -> Iterator[Modes]:
    labels: tuple[str | None, ...] = (None, *group[0].labels)
    for choice in combinations_with_replacement(labels, len(group)):
        yield {n.number: (label,) * len(n.cards) for n, label in zip(group, choice, strict=True) if label is not None}


def _merged(parts: tuple[Modes, ...]) -> Modes:
    return {node: labels for part in parts for node, labels in part.items()}


def _modes_in(problem: Problem, state: State) -> Modes:
    """The modes of the nodes that are in use and no longer as found."""
    now: Modes = {}
    for node in problem.nodes:
        labels = state.label[node.number]
        if state.touched[node.number] and labels != [card.current for card in node.cards] and None not in labels:
            now[node.number] = tuple(label for label in labels if label is not None)
    return now


def _neighbour(problem: Problem, modes: Modes, chance: Random) -> Modes:
    """`modes` with one node, or where modes may be mixed one card, in another mode."""
    busy = {running.node for running in problem.running if running.fixed}
    free = [node for node in problem.nodes if node.labels and node.number not in busy]
    if not free:
        return modes
    node = chance.choice(free)
    now = modes.get(node.number)
    label = chance.choice((None, *node.labels))
    if problem.mixed and label is not None and chance.random() < 0.7:
        labels = now or tuple(card.current or "" for card in node.cards)
        changed = _one_card(labels, node, label, chance)
        return {**modes, node.number: changed} if changed else modes
    if label is None:
        return {other: labels for other, labels in modes.items() if other != node.number}
    return {**modes, node.number: (label,) * len(node.cards)}


def _one_card(labels: tuple[str, ...], node: PlanNode, label: str, chance: Random) -> tuple[str, ...] | None:
    """One card into `label`, where the node is in that memory mode and all its modes are allowed."""
    at = chance.randrange(len(labels))
    if {mode.partition("/")[2] for mode in labels} != {label.partition("/")[2]} or not set(labels) <= set(node.labels):
        return None
    return (*labels[:at], label, *labels[at + 1 :])
