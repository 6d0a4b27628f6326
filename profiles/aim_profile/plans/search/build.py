"""One construction of a placement: level by level, in the modes as found or given.

What does not fit switches the empty node (or, with mixed modes, the empty card) that then takes most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from .aggregate import Aim, PoolKey
from .bins import Bin, Found, Held, slot_of, switching
from .problem import LEVELS, Job, Modes, PlanNode, Problem, Running
from .state import State


class Switch(NamedTuple):
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


def slots_of(problem: Problem, switch: Switch) -> Counter[int]:
    """Devices by kind that a switch makes."""
    slots: Counter[int] = Counter()
    cards = switch.node.cards
    for card in cards if switch.positions is None else (cards[at] for at in switch.positions):
        kind = card.kinds[switch.label]
        slots[kind] += problem.kinds[kind].partitions
    return slots


def modes_of(node: PlanNode) -> Iterator[tuple[str, ...]]:
    """The modes a whole node can be in: all its cards in the same."""
    for label in node.labels:
        yield (label,) * len(node.cards)


def switches(state: State) -> Iterator[Switch]:
    """Every switch of an empty node, one for nodes that are alike; with mixed modes also of empty cards."""
    seen: set[object] = set()
    for node in state.problem.nodes:
        now = tuple(state.label[node.number])
        if not node.labels:
            continue
        if not state.touched[node.number] and (node.alike, now) not in seen:
            seen.add((node.alike, now))
            for labels in modes_of(node):
                if labels != now:
                    yield Switch(node, labels[0], None)
        if state.problem.mixed:
            yield from _card_switches(state, node, now)


def _card_switches(state: State, node: PlanNode, now: tuple[str | None, ...]) -> Iterator[Switch]:
    """Empty cards of one node into another compute mode of the memory mode it is in."""
    empty = _empty_cards(state, node)
    memory = {label.split("/")[1] for label in now if label}
    for label in node.labels:
        cards = tuple(at for at in empty if now[at] != label)
        if memory != {label.split("/")[1]} or not cards:
            continue
        for number in (1, 2, 4, 8):
            if number <= len(cards) and (number == 1 or label.startswith("SPX")):
                yield Switch(node, label, cards[:number])


_NODES_TO_TRY = 32


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


class Builder:
    """One construction, from `modes` (nodes left out: as found). may_switch: whether empty nodes may follow;

    aim: which pools to fill with whom first; onto: a placement to go on with, by `add`.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        modes: Modes,
        may_switch: bool,
        aim: Aim | None = None,
        onto: State | None = None,
    ) -> None:
        self.problem, self.strategy, self.may_switch = problem, strategy, may_switch
        chance = Random(strategy.seed) if strategy.seed else None
        # Only sizes are disturbed, and by a factor: what comes first should mostly still come first.
        self.weight = [job.size * (chance.choice((0.3, 1.0, 3.0)) if chance else 1.0) for job in problem.jobs]
        self.state = onto or State(problem, modes, strategy.fraction_first, chance)
        self.left = [0 if onto else job.workload.replicas for job in problem.jobs]
        self.running: dict[int, list[Running]] = {}
        self.terms = aim.terms if aim else None
        self.shares = {key: dict(shares) for key, shares in aim.shares.items()} if aim else {}

    def build(self) -> State:
        self._keep_running()
        if self.terms is not None:
            self._place_meant()
        elif self.strategy.lenient:
            for job in sorted(self.problem.jobs, key=lambda job: (job.own_level, job.rank, job.index)):
                if job.pin is not None and not job.affinity:
                    self._place_special(job)
        for level in range(LEVELS):
            self._fill_level(level)
        return self.state

    def add(self, job: Job, replicas: int) -> list[tuple[Bin, Held]]:
        """Place up to so many replicas of `job`, beside what stands already; where they stand."""
        self.left[job.index] = replicas
        placed = []
        while self.left[job.index] and (one := self._place_one(job)):
            placed.append(one)
        self.left[job.index] = 0
        return placed

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
                    self._place(job, found, running)
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
        shared = self.state.shared.at(bin_, slots[0]) if job.limit is not None else None
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
        for same in ordered if self.terms else ():
            self._fill_meant(same)
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
        while self.left[job.index] and (most := most - 1) >= 0 and self._place_one(job):
            pass

    def _place_one(self, job: Job) -> tuple[Bin, Held] | None:
        found = self._meant(job) or self.state.find(job)
        if found is None and (self._bring_target(job) or (self.may_switch and self._switch_for_one(job))):
            found = self.state.find(job)
        return None if found is None else (found.bin, self._place(job, found))

    def _meant(self, job: Job) -> Found | None:
        """The best place in the pools it is meant for, while they want more of it."""
        for (kind, node), number in self._shares(job).items():
            if number > 0:
                option = {kind: job.options[kind]}
                found = self.state.find_on(job, (node,), option) if node >= 0 else self.state.find(job, option)
                if found is not None:
                    return found
        return None

    def _place(self, job: Job, found: Found, running: Running | None = None) -> Held:
        self.left[job.index] -= 1
        if (shares := self._shares(job)) and self.terms:
            pool = self.terms.pool_of(found.bin.kind.number, found.bin.node)
            shares[pool] = shares.get(pool, 0) - 1
        return self.state.place(job, found, running)

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

    def _place_meant(self) -> None:
        """What cares where it stands goes there first, whatever its level: the aim keeps room for all it says."""
        picky = [job for job in self.problem.jobs if job.constrained or job.rank < 0]
        for job in sorted(picky, key=lambda job: (job.rank, job.pin is None, job.own_level, job.index)):
            self._fill_meant([job])

    def _fill_meant(self, same: list[Job]) -> None:
        """Place what the aim says of jobs of one shape, where it says."""
        last: Found | None = None
        for job in same:
            while self.left[job.index]:
                again = self._still_best(job, last)
                last = again if again and self._wants(job, again) else self._meant(job)
                if last is None:
                    return
                self._place(job, last)

    def _shares(self, job: Job) -> dict[PoolKey, int]:
        """How many more of its class each pool wants."""
        return self.shares.get(self.terms.class_of(job), {}) if self.terms else {}

    def _wants(self, job: Job, found: Found) -> bool:
        assert self.terms is not None
        return self._shares(job).get(self.terms.pool_of(found.bin.kind.number, found.bin.node), 0) > 0

    def _fill(self, shapes: list[list[Job]]) -> None:
        """Place all that fits. Jobs of one shape fit alike: the first failure ends the shape."""
        for same in shapes:
            last: Found | None = None
            for job in same:
                while self.left[job.index] and (last := self._still_best(job, last) or self.state.find(job)):
                    self._place(job, last)
                if self.left[job.index]:
                    break

    def _still_best(self, job: Job, last: Found | None) -> Found | None:
        """The bin the last replica of this shape took, while there is room: it got fuller, so none is better."""
        if last is None or job.limit is not None or self.strategy.seed or job.constrained:
            return None
        return last if last.bin.free >= job.options[last.bin.kind.number].devices else None

    # Switching modes.

    def _switch_for_one(self, job: Job) -> bool:
        """Switch the cheapest empty node so that one more replica of `job` fits; False where none would do."""
        best: tuple[tuple[int, ...], PlanNode, tuple[str, ...]] | None = None
        for node in self._switchable(job):
            for labels in modes_of(node):
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

    def _best_switch(self, waiting: list[tuple[Job, int]], lower: list[tuple[Job, int]]) -> Switch | None:
        best: tuple[tuple[float, ...], Switch] | None = None
        for switch in switches(self.state):
            slots = slots_of(self.problem, switch)
            placed = take(list(waiting), slots)
            if not placed:
                continue
            drained, switched = switch.cost(self.state)
            value = (-placed, drained) if self.strategy.dense else (drained, -placed)
            rank = (*value, switched, -take(list(lower), slots), switch.node.number, *(switch.positions or ()))
            if best is None or rank < best[0]:
                best = (rank, switch)
        return None if best is None else best[1]


def take(waiting: list[tuple[Job, int]], slots: Counter[int]) -> int:
    """How many of the waiting replicas these devices take, in order; takes the devices, leaves the rest waiting.

    An estimate where devices are shared, and where siblings left over lie on different cards.
    """
    placed = 0
    rest = []
    for job, count in waiting:
        for kind, option in job.options.items():
            have = slots.get(kind, 0)
            if have < option.devices or not count:
                continue
            per_device = 1 if job.limit is None else max(1, option.budget // job.limit)
            taken = min(count, have // option.devices * per_device)
            slots[kind] = have - -(-taken // per_device) * option.devices
            placed += taken
            count -= taken
        if count:
            rest.append((job, count))
    waiting[:] = rest
    return placed
