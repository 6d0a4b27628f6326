"""Whose turn it is. Pure.

While a sequence has no first token yet, all that are less urgent leave the step to it, so that its first token comes as
soon as if it were alone; but one step in ``EVERYBODYS_STEP`` is everybody's, so that they go on, too.

A step computes sequences of one adapter, or of none. The groups take turns step by step, so that nobody waits for
longer than one step of each other group. Changing the adapter costs llama.cpp some 2 ms of rebuilding its graph
(SmolLM2-135M, whose step takes 14).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .slots import Slot

#: Of so many steps the last one is everybody's: a first token takes no more than a seventh of its steps longer, and an
#: answer never stands still for more than seven.
EVERYBODYS_STEP = 8


class Turn(NamedTuple):
    """The slots that may be computed together now, and how many groups share the time."""

    slots: list[Slot]
    groups: int


class Turns:
    """Who is computed in the next step."""

    def __init__(self) -> None:
        self._rounds = _Rounds()
        self._urgent_rounds = _Rounds()
        self._yielded = 0  # steps since everybody had one

    def next(self, busy: Sequence[Slot]) -> Turn:
        urgent = _urgent(busy)
        if len(urgent) == len(busy) or self._yielded == EVERYBODYS_STEP - 1:
            self._yielded = 0
            return self._rounds.next(busy)
        self._yielded += 1
        return self._urgent_rounds.next(urgent)


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


def _urgent(busy: Sequence[Slot]) -> Sequence[Slot]:
    """All but those that are less urgent than one that has no first token yet."""
    first = min((slot.running.priority for slot in busy if slot.running.generated == 0), default=None)
    return busy if first is None else [slot for slot in busy if slot.running.priority <= first]
