"""The switches a plan may make: empty nodes, and with mixed modes empty cards, into modes they can take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from .plan_bins import switching
from .plan_problem import PlanNode, Problem
from .plan_state import State


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
