"""Whose turn it is. Pure.

While a sequence has no first token yet, all that are less urgent leave the step to it, so that its first token comes
as soon as if it were alone. While one generates, the prompts of all that are less urgent wait: each would stall it,
and those who wait for its slot, for many times a step. After ``MOST_YIELDED_STEPS`` such steps one is left to them, so
that they go on, too.

A step computes sequences of one adapter, or of none. The groups take turns step by step, so that nobody waits for
longer than one step of each other group. Changing the adapter costs llama.cpp some 2 ms of rebuilding its graph
(SmolLM2-135M, whose step takes 14).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from .slots import Slot

#: A first token comes no more than a seventh of its steps later, and an answer never stands still for more than seven.
MOST_YIELDED_STEPS = 7


class Turn(NamedTuple):
    """The slots that may be computed together now, and how many groups share the time."""

    slots: list[Slot]
    groups: int


class Turns:
    """Who is computed in the next step."""

    def __init__(self) -> None:
        self._rounds = _Rounds()
        self._urgent_rounds = _Rounds()
        self._yielded = 0

    def next(self, busy: Sequence[Slot]) -> Turn:
        urgent = _undisturbed(busy)
        if len(urgent) == len(busy):
            self._yielded = 0
            return self._rounds.next(busy)
        if self._yielded == MOST_YIELDED_STEPS:
            self._yielded = 0
            return self._rounds.next([slot for slot in busy if slot not in urgent or slot.running.generated])
        self._yielded += 1
        return self._urgent_rounds.next(urgent)


def _undisturbed(busy: Sequence[Slot]) -> list[Slot]:
    """Those that no more urgent one would rather be without in its step."""
    first = min((slot.running.priority for slot in busy if slot.running.generated == 0), default=inf)
    generating = min((slot.running.priority for slot in busy if slot.pending == 1), default=inf)
    return [
        slot
        for slot in busy
        if slot.running.priority <= first and (slot.pending == 1 or slot.running.priority <= generating)
    ]


class _Rounds:
    """Goes round the groups in the order of their keys: one that is always there is met once in every round, however
    often the others come and go."""

    def __init__(self) -> None:
        self._last = ""

    def next(self, busy: Sequence[Slot]) -> Turn:
        keys = sorted({slot.running.weights for slot in busy})
        if len(keys) < 2:
            return Turn(list(busy), 1)
        self._last = next((key for key in keys if key > self._last), keys[0])
        return Turn([slot for slot in busy if slot.running.weights == self._last], len(keys))
