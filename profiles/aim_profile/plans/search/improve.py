"""Improve a placement: try other modes, all of them where they are few, else the neighbours of the best so far."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, product
from math import comb, prod
from random import Random

from .bound import is_best
from .build import Builder, Strategy
from .problem import Modes, PlanNode, Problem
from .state import Score, State

_FILLS = (Strategy(), Strategy(fraction_first=True), Strategy(large_first=False), Strategy(lenient=False))
_ELITE = 8


def fill(problem: Problem, modes: Modes, strategy: Strategy) -> State:
    """The placement in given modes; nodes left out are as found, and nothing is switched."""
    return Builder(problem, strategy, modes, may_switch=False).build()


def improve(problem: Problem, best: State, tries: int) -> State:
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
