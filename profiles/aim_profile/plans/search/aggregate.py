"""Which modes the whole workload needs, in totals: before any replica gets its place.

An integer programme over (nodes alike x mode) and (workloads alike x pool of devices), with the planner's objective
level by level. A *pool* is all devices of one kind, or those of them on a node that a workload is pinned to. It sees
neither affinities nor which card a pin names; the placement that follows does, and may reach less. Its size depends on
how many *kinds* of nodes and of workloads there are, not on how many of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from aim_profile.sizing.fit import DEFAULT_UTILIZATION, budget_bytes

from .bins import switching
from .problem import LEVELS, Job, Modes, PlanNode, Problem
from .program import Program, Terms

#: Nodes that pins name become pools of their own up to that many.
_MOST_NAMED = 32
# (level, shape, node or -1): jobs that want the same, where node is one that a pin names.
Class = tuple[int, int, int]
# (kind, node or -1)
PoolKey = tuple[int, int]


class Aim(NamedTuple):
    """What to build. modes: of the nodes to switch; shares: how many replicas of each class go to which pool;

    placed: by level; named: the nodes that are pools of their own.
    """

    modes: Modes
    shares: dict[Class, dict[PoolKey, int]]
    placed: tuple[int, ...]
    named: frozenset[int]


def class_of(job: Job, named: frozenset[int]) -> Class:
    """The class of a job, where these nodes are pools of their own."""
    return job.own_level, job.shape, job.pin[0] if job.pin and job.pin[0] in named else -1


def pool_of(kind: int, node: int, named: frozenset[int]) -> PoolKey:
    """The pool that devices of a node belong to."""
    return kind, node if node in named else -1


class _Choice(NamedTuple):
    """Nodes of a group in one mode; label None: as found. variable: how many; moved: of them hold what runs."""

    group: int
    label: str | None
    drains: int
    switches: int
    moved: int
    variable: int


@dataclass
class _Pool:
    """Devices of one kind. boxes: (variable or -1, devices, number): so many cards (hives, of whole cards) with that
    many devices free for each node the variable counts, once where it is -1; cards: the empty cards, by variable;
    part: devices free on cards in use; room: parts of a device free on shared ones.
    """

    per_card: int
    boxes: list[tuple[int, int, int]] = field(default_factory=list)
    cards: Counter[int] = field(default_factory=Counter)
    part: int = 0


def aim(problem: Problem) -> Aim | None:
    """The best modes and shares in totals; None where the solver found none within its bounds."""
    return _Totals(problem).aim()


class _Totals:
    """The programme of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.program = Program()
        pinned = {job.pin[0] for job in problem.jobs if job.pin}
        self.named = frozenset(pinned if len(pinned) <= _MOST_NAMED else ())
        self.pools: dict[PoolKey, _Pool] = {}
        self.groups = self._grouped()
        self.choices = [choice for at in range(len(self.groups)) for choice in self._choices(at)]
        self._stand()
        self.classes = self._classes()
        self.share = {
            (key, pool): self.program.variable(count)
            for key, (job, count) in self.classes.items()
            for pool in self.pools
            if pool[0] in job.options and key[2] in (-1, pool[1])
        }
        self.used: list[int] = []
        self._demand()
        self._capacity()

    def aim(self) -> Aim | None:
        """Solves it."""
        answer = self.program.solve([terms for terms in self._objectives() if terms])
        if answer is None:
            return None
        shares: dict[Class, dict[PoolKey, int]] = {}
        placed = [0] * LEVELS
        for (key, pool), variable in self.share.items():
            placed[key[0]] += answer[variable]
            if answer[variable]:
                shares.setdefault(key, {})[pool] = answer[variable]
        return Aim(self._modes(answer), shares, tuple(placed), self.named)

    def _modes(self, answer: list[int]) -> Modes:
        """Nodes to switch are taken from the end of their group: placing fills nodes as found from the front."""
        modes: Modes = {}
        left = [list(group) for group in self.groups]
        for choice in self.choices:
            for _ in range(answer[choice.variable] if choice.label is not None else 0):
                node = left[choice.group].pop()
                modes[node.number] = (choice.label or "",) * len(node.cards)
        return modes

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _grouped(self) -> list[list[PlanNode]]:
        """Nodes without a replica that must stay, those together that are alike; named ones and busy ones apart."""
        fixed = {run.node for run in self.problem.running if run.fixed}
        self.busy = Counter(run.node for run in self.problem.running)
        groups: dict[tuple[int, int, int], list[PlanNode]] = {}
        for node in self.problem.nodes:
            if node.number not in fixed:
                place = node.number if node.number in self.named else -1
                groups.setdefault((node.alike, place, self.busy[node.number]), []).append(node)
        return list(groups.values())

    def _choices(self, group: int) -> Iterator[_Choice]:
        nodes = self.groups[group]
        current = [card.current for card in nodes[0].cards]
        found = []
        for label in (None, *nodes[0].labels):
            drains, switches = (0, 0) if label is None else switching([label] * len(current), current)
            if label is None or drains or switches:
                moved = 0 if label is None else self.busy[nodes[0].number]
                found.append(
                    _Choice(group, label, drains, switches, moved, self.program.variable(len(nodes), hard=True))
                )
                self._offer(nodes[0], label, found[-1].variable)
        self.program.exactly({choice.variable: 1 for choice in found}, len(nodes))
        yield from found

    def _pool(self, node: PlanNode, kind: int) -> _Pool:
        return self.pools.setdefault(pool_of(kind, node.number, self.named), _Pool(self.problem.kinds[kind].partitions))

    def _offer(self, node: PlanNode, label: str | None, variable: int) -> None:
        """What a node that takes this choice brings."""
        boxes: Counter[tuple[int, int]] = Counter()
        for card in node.cards:
            kind = card.as_found if label is None else card.kinds[label]
            if kind >= 0:
                self._pool(node, kind).cards[variable] += 1
                boxes[kind, card.hive if self.problem.kinds[kind].whole else -1] += 1
        for (kind, hive), cards in boxes.items():
            pool = self._pool(node, kind)
            pool.boxes.append((variable, pool.per_card, cards) if hive < 0 else (variable, cards, 1))

    def _stand(self) -> None:
        """Nodes with replicas that must stay: as found, less the devices taken."""
        taken: dict[int, set[tuple[int, int]]] = {}
        for run in self.problem.running:
            if run.fixed:
                taken.setdefault(run.node, set()).update(run.devices)
        for number, devices in sorted(taken.items()):
            node = self.problem.nodes[number]
            held = Counter(position for position, _ in devices)
            hives: Counter[tuple[int, int]] = Counter()
            for at, card in enumerate(node.cards):
                if card.as_found < 0:
                    continue
                pool = self._pool(node, card.as_found)
                pool.cards[-1] += not held[at]
                if self.problem.kinds[card.as_found].whole:
                    hives[card.as_found, card.hive] += not held[at]
                else:
                    pool.part += pool.per_card - held[at] if held[at] else 0
                    pool.boxes.append((-1, pool.per_card - held[at], 1))
            for (kind, _), cards in hives.items():
                self._pool(node, kind).boxes.append((-1, cards, 1))

    # --- workloads ------------------------------------------------------------------------------------------------

    def _classes(self) -> dict[Class, tuple[Job, int]]:
        """By class: an example, and how many replicas may still be placed."""
        counts: Counter[Class] = Counter()
        example: dict[Class, Job] = {}
        standing = Counter(run.job for run in self.problem.running if run.fixed)
        sites = {"node": len(self.problem.nodes), "card": sum(len(node.cards) for node in self.problem.nodes)}
        for job in self.problem.jobs:
            key = class_of(job, self.named)
            most = min(job.workload.replicas, sites.get(job.workload.spread or "", job.workload.replicas))
            counts[key] += max(0, most - standing[job.index])
            example.setdefault(key, job)
        return {key: (example[key], count) for key, count in counts.items() if count}

    def _demand(self) -> None:
        asked: dict[Class, list[int]] = {}
        for (key, _), variable in self.share.items():
            asked.setdefault(key, []).append(variable)
        for key, variables in asked.items():
            self.program.most(dict.fromkeys(variables, 1), self.classes[key][1])

    def _capacity(self) -> None:
        """The devices of a pool hold what is given to it; cards in use are counted."""
        given: dict[PoolKey, list[tuple[Job, int]]] = {}
        for (key, at), variable in self.share.items():
            given.setdefault(at, []).append((self.classes[key][0], variable))
        for at, shares in given.items():
            pool = self.pools[at]
            alone = {variable: job.options[at[0]].devices for job, variable in shares if job.limit is None}
            sharing = {variable: 1 / self._beside(job, at[0]) for job, variable in shares if job.limit is not None}
            taken: dict[int, float] = {**alone}
            if sharing:
                shared = self.program.variable(self._most(pool) * pool.per_card + pool.part)
                self.program.most({**sharing, shared: -1}, 0)
                taken[shared] = 1
            used = self.program.variable(self._most(pool))
            self.used.append(used)
            self.program.most({**taken, used: -pool.per_card}, pool.part)
            brought = {variable: -cards for variable, cards in pool.cards.items() if variable >= 0}
            self.program.most({used: 1, **brought}, pool.cards[-1])
            self._together(pool, alone)

    def _beside(self, job: Job, kind: int) -> int:
        """How many of that job's kind share a device."""
        budget = budget_bytes(self.problem.kinds[kind].device_bytes, DEFAULT_UTILIZATION)
        return max(1, budget // (job.limit or budget))

    def _most(self, pool: _Pool) -> int:
        """The most cards it can have."""
        nodes = {choice.variable: len(self.groups[choice.group]) for choice in self.choices}
        return sum(nodes.get(variable, 1) * cards for variable, cards in pool.cards.items())

    def _together(self, pool: _Pool, alone: dict[int, int]) -> None:
        """Replicas over several devices have them on one card, or of one hive."""
        for devices in sorted({number for number in alone.values() if number > 1}):
            terms: dict[int, float] = {variable: 1 for variable, number in alone.items() if number >= devices}
            limit = 0
            for variable, size, number in pool.boxes:
                if variable < 0:
                    limit += size // devices * number
                else:
                    terms[variable] = terms.get(variable, 0) - size // devices * number
            self.program.most(terms, limit)

    # --- objective ------------------------------------------------------------------------------------------------

    def _objectives(self) -> Iterator[Terms]:
        """As State.score: less is better."""
        for level in range(LEVELS):
            yield {variable: -1 for (key, _), variable in self.share.items() if key[0] == level}
        yield {variable: 1 for (key, at), variable in self.share.items() if at[0] in self.classes[key][0].avoided}
        for name in ("drains", "switches", "moved"):
            yield {choice.variable: cost for choice in self.choices if (cost := getattr(choice, name))}
        yield dict.fromkeys(self.used, 1)
