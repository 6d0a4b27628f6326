"""Numbers over steps, thinned to what can be drawn: pure, linear in the steps."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: A run of fewer steps is drawn as it is.
FEWEST_SMOOTHED = 24
_SPAN_SHARE = 0.04


class Point(NamedTuple):
    """A value after a step."""

    step: int
    value: float


class Series:
    """Values in the order of their steps; a value that is no number is a gap. 16 bytes a step."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.values = array("d")

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Point]:
        return map(Point, self.steps, self.values)

    def extremes(self) -> tuple[float, float] | None:
        """The least and the greatest number, if there is one."""
        values = np.asarray(self.values)
        finite = values[np.isfinite(values)]
        return (float(finite.min()), float(finite.max())) if len(finite) else None

    def smoothed(self) -> Series:
        """The exponential mean over a 25th of the steps, without its bias to the first ones."""
        smooth = Series()
        keep = 1 - 2 / (max(1.0, len(self) * _SPAN_SHARE) + 1)
        total = weight = 0.0
        for step, value in self:
            if math.isfinite(value):
                total, weight = keep * total + value, keep * weight + 1
            smooth.add(step, total / weight if weight else math.nan)
        return smooth

    def thinned(self, columns: int) -> list[Point]:
        """At most 2 points a column of as many steps each: its least and its greatest, so that no spike is lost. A
        column without a number is a gap.
        """
        if len(self) <= 2 * columns:
            return list(self)
        steps, values = np.asarray(self.steps), np.asarray(self.values)
        place = (steps - steps[0]) * columns // (steps[-1] - steps[0] + 1)
        begins = np.flatnonzero(np.diff(place, prepend=-1)).tolist()
        kept = [at for first, end in pairwise([*begins, len(self)]) for at in _ends(values[first:end], first)]
        return [Point(self.steps[at], self.values[at]) for at in kept]


def _ends(column: npt.NDArray[np.float64], first: int) -> list[int]:
    finite = np.isfinite(column)
    if not finite.any():
        return [first]
    least, most = np.where(finite, column, np.inf).argmin(), np.where(finite, column, -np.inf).argmax()
    return sorted({first + int(least), first + int(most)})
