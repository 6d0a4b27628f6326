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
from .state import State

#: Nodes that pins name become pools of their own up to that many.
_MOST_NAMED = 32
#: Every node is a pool of its own, and relations count, where (jobs x kinds of all nodes) are at most that many.
_SMALL = 1_500
# (level, shape, -1, a node that a pin names, or -2 - the number of a job by itself): jobs that want the same.
Class = tuple[int, int, int]
# (kind, node or -1)
PoolKey = tuple[int, int]
# Where State.score has the replicas that stay.
_STAY = LEVELS + 3


class Aim(NamedTuple):
    """What to build. modes: of the nodes to switch; shares: how many replicas of each class go to which pool;

    score: what that comes to, as State.score without the replicas that stay; terms: who is of which class and pool.
    """

    modes: Modes
    shares: dict[Class, dict[PoolKey, int]]
    score: tuple[int, ...]
    terms: Sorting

    @property
    def placed(self) -> tuple[int, ...]:
        """Replicas by level, less is better."""
        return self.score[:LEVELS]

    @property
    def unproven(self) -> int:
        """Replicas that span partitions they should avoid."""
        return self.score[LEVELS]

    def reached(self, state: State) -> bool:
        """Whether a placement is as good."""
        score, problem = state.score(), state.problem
        # Some programmes know nothing of cards of one node in different modes.
        if state.stay < len(problem.running) or (problem.mixed and (problem.running or not self.terms.small)):
            return False
        return (*score[:_STAY], *score[_STAY + 1 :]) <= self.score


class Sorting(NamedTuple):
    """What goes together. named: nodes that are pools of their own; small: all are, and jobs with relations too."""

    named: frozenset[int]
    small: bool

    def class_of(self, job: Job) -> Class:
        """The class of a job."""
        if self.small and (job.constrained or job.rank < 0):
            return job.own_level, job.shape, -2 - job.index
        return job.own_level, job.shape, job.pin[0] if job.pin and job.pin[0] in self.named else -1

    def pool_of(self, kind: int, node: int) -> PoolKey:
        """The pool that devices of a node belong to."""
        return kind, node if node in self.named else -1


def _sorting(problem: Problem) -> Sorting:
    kinds = sum(len({*card.kinds.values(), card.as_found}) for node in problem.nodes for card in node.cards[:1])
    small = kinds * len(problem.jobs) <= _SMALL
    named = {node.number for node in problem.nodes} if small else {job.pin[0] for job in problem.jobs if job.pin}
    return Sorting(frozenset(named if small or len(named) <= _MOST_NAMED else ()), small)


class _Choice(NamedTuple):
    """Nodes of a group in one mode. variable: how many."""

    group: int
    label: str
    variable: int


class _Mixed(NamedTuple):
    """Cards of one node in one mode, where its cards may be in different ones. variable: how many."""

    node: PlanNode
    label: str
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
        self.terms = _sorting(problem)
        self.program = Program(small=self.terms.small)
        self.pools: dict[PoolKey, _Pool] = {}
        self.groups = self._grouped()
        self.upper: dict[int, int] = {}  # of the variables that bring cards
        self.drains: dict[int, float] = {}
        self.switches: dict[int, float] = {}
        self.moved: dict[int, float] = {}
        self.late: dict[int, float] = {}
        self.choices: list[_Choice] = []
        self.mixed: list[_Mixed] = []
        for at in range(len(self.groups)):
            self._choose(at)
        self._stand()
        self.classes = self._classes()
        self.share = {
            (key, pool): self.program.variable(count)
            for key, (job, count) in self.classes.items()
            for pool in self.pools
            if pool[0] in job.options and (pool[1] == job.pin[0] if job.pin and key[2] != -1 else True)
        }
        self.used: dict[PoolKey, int] = {}  # how many cards of a pool are in use, and how many devices are shared
        self.shared: dict[PoolKey, int] = {}
        self._demand()
        self._capacity()
        if self.terms.small:
            for job in problem.jobs:
                self._relate(job)
            self._on_pinned_cards()

    def aim(self) -> Aim | None:
        """Solves it."""
        objectives = list(self._objectives())
        answer = self.program.solve([terms for terms in objectives if terms])
        if answer is None:
            return None
        shares: dict[Class, dict[PoolKey, int]] = {}
        for (key, pool), variable in self.share.items():
            if answer[variable]:
                shares.setdefault(key, {})[pool] = answer[variable]
        score = [round(sum(factor * answer[at] for at, factor in terms.items())) for terms in objectives]
        standing = Counter(self.problem.jobs[run.job].own_level for run in self.problem.running if run.fixed)
        for level, count in standing.items():
            score[level] -= count
        return Aim(self._modes(answer), shares, (*score[:_STAY], score[_STAY + 1]), self.terms)

    def _modes(self, answer: list[int]) -> Modes:
        """Nodes to switch are taken from the end of their group: placing fills nodes as found from the front."""
        modes: Modes = {}
        left = [list(group) for group in self.groups]
        for choice in self.choices:
            for _ in range(answer[choice.variable]):
                node = left[choice.group].pop()
                modes[node.number] = (choice.label,) * len(node.cards)
        wanted: dict[int, list[str]] = {}
        for node, label, variable in self.mixed:
            wanted.setdefault(node.number, []).extend([label] * answer[variable])
        for number, labels in wanted.items():
            if labels:
                modes[number] = _spread_out(labels, [card.current or "" for card in self.problem.nodes[number].cards])
        return modes

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _grouped(self) -> list[list[PlanNode]]:
        """Nodes without a replica that must stay, those together that are alike; named ones and busy ones apart."""
        fixed = {run.node for run in self.problem.running if run.fixed}
        self.busy = Counter(run.node for run in self.problem.running)
        groups: dict[tuple[int, int, int], list[PlanNode]] = {}
        for node in self.problem.nodes:
            if node.number not in fixed:
                place = node.number if node.number in self.terms.named else -1
                groups.setdefault((node.alike, place, self.busy[node.number]), []).append(node)
        return list(groups.values())

    def _choose(self, group: int) -> None:
        """Each node of a group is as found, or in one of its modes."""
        nodes = self.groups[group]
        as_found = self._variable(len(nodes))
        self._offer(nodes[0], None, as_found)
        others = self._memory_modes(nodes[0]) if self.problem.mixed and self.terms.small else self._modes_of(group)
        for variable in others:
            self.moved[variable] = self.busy[nodes[0].number]
            self.late[variable] = len(self.problem.nodes) - nodes[0].number
        self.program.exactly(dict.fromkeys([as_found, *others], 1), len(nodes))

    def _variable(self, most: int) -> int:
        variable = self.program.variable(most, hard=True)
        self.upper[variable] = most
        return variable

    def _modes_of(self, group: int) -> list[int]:
        """All cards of a node in the same mode."""
        nodes = self.groups[group]
        current = [card.current for card in nodes[0].cards]
        found = []
        for label in nodes[0].labels:
            drains, switches = switching([label] * len(current), current)
            if drains or switches:
                variable = self._variable(len(nodes))
                self.choices.append(_Choice(group, label, variable))
                self.drains[variable], self.switches[variable] = drains, switches
                self._offer(nodes[0], label, variable)
                found.append(variable)
        return found

    def _memory_modes(self, node: PlanNode) -> list[int]:
        """All cards of a node in the same memory mode, and each in a compute mode of its own."""
        current = [card.current or "" for card in node.cards]
        found = []
        for memory in sorted({_parts(label)[1] for label in node.labels}):
            chosen = self._variable(1)
            self.drains[chosen] = int(any(_parts(label)[1] != memory for label in current))
            self.switches[chosen] = len(current)
            cards: dict[str, int] = {}
            for label in (label for label in node.labels if _parts(label)[1] == memory):
                cards[_parts(label)[0]] = variable = self._variable(len(current))
                self.mixed.append(_Mixed(node, label, variable))
                pool = self._pool(node, node.cards[0].kinds[label])
                pool.cards[variable] += 1
                pool.boxes.append((variable, pool.per_card, 1))
            self.program.exactly({**dict.fromkeys(cards.values(), 1), chosen: -len(current)}, 0)
            for compute, number in Counter(_parts(label)[0] for label in current).items():
                if compute in cards:
                    kept = self.program.variable(number)
                    self.program.most({kept: 1, cards[compute]: -1}, 0)
                    self.switches[kept] = -1
            found.append(chosen)
        return found

    def _pool(self, node: PlanNode, kind: int) -> _Pool:
        return self.pools.setdefault(self.terms.pool_of(kind, node.number), _Pool(self.problem.kinds[kind].partitions))

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
            key = self.terms.class_of(job)
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
                self.shared[at] = shared
            used = self.program.variable(self._most(pool))
            self.used[at] = used
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
        return sum(self.upper.get(variable, 1) * cards for variable, cards in pool.cards.items())

    def _together(self, pool: _Pool, alone: dict[int, int]) -> None:
        """Replicas over several devices have them on one card, or of one hive."""
        for devices in sorted({number for number in alone.values() if number > 1}):
            if pool.per_card == 1 and self.mixed:
                continue  # how many cards of a hive stay whole is seen to as they are placed
            terms: dict[int, float] = {variable: 1 for variable, number in alone.items() if number >= devices}
            limit = 0
            for variable, size, number in pool.boxes:
                if variable < 0:
                    limit += size // devices * number
                else:
                    terms[variable] = terms.get(variable, 0) - size // devices * number
            self.program.most(terms, limit)

    def _on_pinned_cards(self) -> None:
        """What is pinned to one card stands on that, in whichever mode it is."""
        taken: dict[tuple[int, int], dict[int, float]] = {}
        for key, (job, _) in self.classes.items():
            if job.pin is None or job.pin[1] is None or job.limit is not None:
                continue
            for at, pool in self.pools.items():
                if (key, at) in self.share:
                    part = job.options[at[0]].devices / pool.per_card
                    taken.setdefault((job.pin[0], job.pin[1]), {})[self.share[key, at]] = part
        for parts in taken.values():
            self.program.most(parts, 1)

    # --- relations, in small fleets -------------------------------------------------------------------------------

    def _here(self, job: Job) -> dict[int, dict[int, float]]:
        """By node: the variables that count replicas of `job` there."""
        here: dict[int, dict[int, float]] = {node.number: {} for node in self.problem.nodes}
        key = self.terms.class_of(job)
        for pool in self.pools:
            if (key, pool) in self.share:
                here[pool[1]][self.share[key, pool]] = 1
        return here

    def _relate(self, job: Job) -> None:
        standing = Counter((run.job, run.node) for run in self.problem.running if run.fixed)
        if not job.constrained:
            return
        for node, mine in self._here(job).items():
            if job.workload.spread == "node" or job.index in job.anti_affinity:
                self.program.most(mine, 1 - standing[job.index, node])
            for target in job.affinity:
                if not standing[target, node]:
                    self.program.most({**mine, self._present(target, node): -job.workload.replicas}, 0)
            for other in job.anti_affinity:
                if standing[other, node]:
                    self.program.most(mine, 0)
                elif other < job.index:
                    absent = self.program.variable(1)
                    self.program.most({**mine, absent: job.workload.replicas}, job.workload.replicas)
                    theirs, most = (
                        self._here(self.problem.jobs[other])[node],
                        self.problem.jobs[other].workload.replicas,
                    )
                    self.program.most({**theirs, absent: -most}, 0)
        if job.workload.spread == "card":
            self._on_different_cards(job)

    def _present(self, job: int, node: int) -> int:
        """A variable that is 1 only where a replica of that job stands on the node."""
        here = self.program.variable(1)
        self.program.most({here: 1, **dict.fromkeys(self._here(self.problem.jobs[job])[node], -1)}, 0)
        return here

    def _on_different_cards(self, job: Job) -> None:
        key = self.terms.class_of(job)
        for at, used in self.used.items():
            if (key, at) in self.share and not self.pools[at].part:
                self.program.most({self.share[key, at]: 1, used: -1}, 0)
                if job.limit is not None:
                    self.program.most({self.share[key, at]: 1, self.shared[at]: -1}, 0)

    # --- objective ------------------------------------------------------------------------------------------------

    def _objectives(self) -> Iterator[Terms]:
        """As State.score: less is better; of nodes that are as good the last is switched, and the first used."""
        for level in range(LEVELS):
            yield {variable: -1 for (key, _), variable in self.share.items() if key[0] == level}
        yield {variable: 1 for (key, at), variable in self.share.items() if at[0] in self.classes[key][0].avoided}
        for costs in (self.drains, self.switches, self.moved):
            yield {variable: cost for variable, cost in costs.items() if cost}
        yield dict.fromkeys(self.used.values(), 1)
        if self.terms.small:
            yield {variable: cost for variable, cost in self.late.items() if cost}
            yield {used: node for (_, node), used in self.used.items() if node > 0}


def _parts(label: str) -> tuple[str, str]:
    """Compute and memory mode."""
    compute, _, memory = label.partition("/")
    return compute, memory


def _spread_out(labels: list[str], current: list[str]) -> tuple[str, ...]:
    """These modes over the cards of a node, so that as many as can be keep their compute mode."""
    left = list(labels)
    given: list[str | None] = []
    for was in current:
        same = next((label for label in left if _parts(label)[0] == _parts(was)[0]), None)
        if same is not None:
            left.remove(same)
        given.append(same)
    return tuple(label or left.pop() for label in given)
