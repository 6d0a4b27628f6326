"""Whose turn it is: a step computes sequences of one adapter, or of none. Pure.

The groups take turns step by step, so that nobody waits for longer than one step of each other group. Changing the
adapter costs llama.cpp some 2 ms of rebuilding its graph (SmolLM2-135M, whose step takes 14).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .slots import Slot


class Turn(NamedTuple):
    """The slots that may be computed together now, and how many groups share the time."""

    slots: list[Slot]
    groups: int


class Turns:
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
