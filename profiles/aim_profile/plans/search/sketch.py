"""Which modes a fleet needs, in counts: before any replica gets its place.

The sketch adds up devices by kind and replicas by shape, node by node, and asks for the fewest drained nodes, then the
fewest switched ones, that still place as many replicas of each level. It sees neither pins nor affinities; the
placement that follows does, and it may switch more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .bins import switching
from .problem import LEVELS, Job, PlanNode, Problem

Modes = dict[int, tuple[str, ...]]
_UNLIMITED = 1 << 30


class Choice(NamedTuple):
    """A node of a group in one mode; label None: as found. slots: devices by kind."""

    group: int
    label: str | None
    drains: int
    switches: int
    slots: Counter[int]


@dataclass
class _Outcome:
    """placed: by level; modes: of the nodes to switch, from_group: how many of each group; drained, switched: nodes."""

    placed: list[int] = field(default_factory=lambda: [0] * LEVELS)
    modes: Modes = field(default_factory=dict)
    from_group: Counter[int] = field(default_factory=Counter)
    drained: int = 0
    switched: int = 0


class Sketch:
    """The counts of a problem, and the search over how many nodes may change."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        busy = {running.node for running in problem.running}
        groups: dict[int, list[PlanNode]] = {}
        for node in problem.nodes:
            if node.number not in busy:
                groups.setdefault(node.alike, []).append(node)
        self.groups = list(groups.values())
        self.choices = [choice for at in range(len(self.groups)) for choice in self._choices(at)]
        self.waiting = self._waiting()

    def starts(self) -> list[Modes]:
        """Modes of the nodes to switch: fewest drained, then fewest switched, for the most that can be placed.

        A second answer drains a few more: counts hide what does not fit side by side.
        """
        most = self._run(_UNLIMITED, _UNLIMITED)
        drains = self._least(most.drained, lambda number: self._run(number, _UNLIMITED), most)
        found = [self._fewest_switches(drains)]
        slack = max(1, len(self.problem.nodes) // 50)
        more = self._fewest_switches(drains + slack)
        return [*found, more] if found[0] and more != found[0] else found

    def _fewest_switches(self, drains: int) -> Modes:
        best = self._run(drains, _UNLIMITED)
        if all(choice.drains or not choice.switches for choice in self.choices):
            return best.modes
        switches = self._least(best.switched, lambda number: self._run(drains, number), best)
        return self._run(drains, switches).modes

    def _least(self, most: int, run: Callable[[int], _Outcome], goal: _Outcome) -> int:
        """The least number for which `run` places as much as `goal`, by bisection."""
        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            if run(middle).placed >= goal.placed:
                high = middle
            else:
                low = middle + 1
        return high

    def _choices(self, group: int) -> Iterator[Choice]:
        node = self.groups[group][0]
        current = [card.current for card in node.cards]
        kinds = Counter(card.as_found for card in node.cards if card.as_found >= 0)
        yield Choice(group, None, 0, 0, self._slots(kinds))
        for label in node.labels:
            drains, switches = switching([label] * len(current), current)
            if drains or switches:
                kinds = Counter(card.kinds[label] for card in node.cards)
                yield Choice(group, label, drains, switches, self._slots(kinds))

    def _slots(self, kinds: Counter[int]) -> Counter[int]:
        return Counter({kind: cards * self.problem.kinds[kind].partitions for kind, cards in kinds.items()})

    def _waiting(self) -> list[list[tuple[Job, int]]]:
        """By level: an example of each shape and how many replicas, large ones first."""
        counts: list[Counter[int]] = [Counter() for _ in range(LEVELS)]
        example: dict[int, Job] = {}
        running = Counter(run.job for run in self.problem.running)
        for job in self.problem.jobs:
            counts[job.own_level][job.shape] += job.workload.replicas - running[job.index]
            example.setdefault(job.shape, job)
        return [
            sorted(
                ((example[s], n) for s, n in level.items() if n > 0), key=lambda item: (-item[0].size, item[0].index)
            )
            for level in counts
        ]

    def _run(self, drains: int, switches: int) -> _Outcome:
        """Level by level: what is open, then node after node the choice that takes most within the allowance."""
        out = _Outcome()
        left = [len(group) for group in self.groups]
        open_: Counter[int] = Counter()
        for level, wanted in enumerate(self.waiting):
            waiting = list(wanted)
            out.placed[level] += take(waiting, open_)
            while waiting:
                choice = self._best(waiting, level, left, drains - out.drained, switches - out.switched)
                if choice is None:
                    break
                for _ in range(self._alike(choice, waiting, left, drains - out.drained, switches - out.switched)):
                    self._use(choice, left, out)
                    open_.update(choice.slots)
                out.placed[level] += take(waiting, open_)
        return out

    def _best(
        self, waiting: list[tuple[Job, int]], level: int, left: list[int], drains: int, switches: int
    ) -> Choice | None:
        best: tuple[tuple[int, ...], Choice] | None = None
        for number, choice in enumerate(self.choices):
            if not left[choice.group] or choice.drains > drains or (choice.switches and not switches):
                continue
            slots = Counter(choice.slots)
            placed = take(list(waiting), slots)
            if not placed:
                continue
            if best is not None and -placed > best[0][0]:
                continue
            lower = sum(take(list(later), slots) for later in self.waiting[level + 1 :])
            rank = (-placed, choice.drains, choice.switches, -lower, number)
            if best is None or rank < best[0]:
                best = (rank, choice)
        return None if best is None else best[1]

    def _alike(
        self, choice: Choice, waiting: list[tuple[Job, int]], left: list[int], drains: int, switches: int
    ) -> int:
        """How many nodes in a row this choice stays the best for: as long as each takes the same."""
        rest = list(waiting)
        take(rest, Counter(choice.slots))
        after = {job.index: count for job, count in rest}
        taken = [(count, count - after.get(job.index, 0)) for job, count in waiting]
        times = min(count // used for count, used in taken if used)
        most = [times, left[choice.group], drains if choice.drains else times, switches if choice.switches else times]
        return max(1, min(most))

    def _use(self, choice: Choice, left: list[int], out: _Outcome) -> None:
        group = self.groups[choice.group]
        left[choice.group] -= 1
        # Nodes to switch are taken from the end: placing fills nodes as found from the front.
        if choice.label is not None:
            node = group[len(group) - 1 - out.from_group[choice.group]]
            out.from_group[choice.group] += 1
            out.modes[node.number] = (choice.label,) * len(node.cards)
            out.drained += choice.drains
            out.switched += 1


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
