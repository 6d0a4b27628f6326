"""How long answers are: a histogram per class that forgets, asked how much longer one of a given age will be.

Lengths are not memoryless: that an answer has 500 tokens already says more about its end than that it has 5, so every
question takes an age. An observation costs a few operations; the first question after it sums the histogram up again.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate, pairwise

from aim_kserve.identity.caller import QosClass

from .request import CLASSES

#: A bucket has the lengths above one edge and up to the next: exact up to 16 tokens, then four to each doubling.
_EDGES: list[int] = [*range(16), *(round(2.0 ** (4 + step / 4)) for step in range(4 * 16 + 1))]
_BUCKETS = len(_EDGES) - 1
_MIDDLES = [(low + 1 + high) / 2 for low, high in pairwise(_EDGES)]
#: An observation weighs half as much after so many others of its class.
_HALF_LIFE = 250
_GROWS = 2.0 ** (1 / _HALF_LIFE)
#: Assumed of a class before anything is known of it: so many observations, alike for every doubling up to 2048 tokens.
_PRIOR, _PRIOR_MOST = 10.0, 2048
#: So much of an observation keeps lengths possible that have never been seen, however many there are of others.
_DOUBT = 0.5


def _log_uniform(most: int) -> list[float]:
    """Shares of the buckets where every doubling from 1 up to ``most`` is alike."""
    widths = [math.log2(high / max(low, 0.5)) if high <= most else 0.0 for low, high in pairwise(_EDGES)]
    return [width / sum(widths) for width in widths]


_UNSEEN = _log_uniform(_EDGES[-1])


class _Histogram:
    """``_counts`` in units of ``_weight``, which grows, so that no observation has to touch all the others."""

    def __init__(self) -> None:
        self._weight = 1.0
        self._counts = [_PRIOR * share for share in _log_uniform(_PRIOR_MOST)]
        self._sums: list[float] = []
        self._moments: tuple[float, float] | None = None

    def observe(self, tokens: int) -> None:
        self._weight *= _GROWS
        if self._weight > 1e100:
            self._counts = [count / self._weight for count in self._counts]
            self._weight = 1.0
        bucket = bisect_left(_EDGES, tokens) - 1
        self._counts[bucket if bucket < _BUCKETS else -1] += self._weight
        self._sums, self._moments = [], None

    def sums(self) -> list[float]:
        """How much weighs no more than each edge, the first 0 and the last all of it."""
        if not self._sums:
            masses = (
                count / self._weight + _DOUBT * unseen for count, unseen in zip(self._counts, _UNSEEN, strict=True)
            )
            self._sums = [0.0, *accumulate(masses)]
        return self._sums

    def up_to(self, tokens: float) -> float:
        """How much is no longer than that; a bucket's are spread evenly over it."""
        sums = self.sums()
        if tokens >= _EDGES[-1]:
            return sums[-1]
        at = bisect_right(_EDGES, tokens) - 1
        share = (tokens - _EDGES[at]) / (_EDGES[at + 1] - _EDGES[at])
        return sums[at] + share * (sums[at + 1] - sums[at])

    def length_at(self, mass: float) -> float:
        """The inverse of ``up_to``."""
        sums = self.sums()
        at = min(max(1, bisect_left(sums, mass)), len(sums) - 1)
        share = (mass - sums[at - 1]) / (sums[at] - sums[at - 1])
        return _EDGES[at - 1] + min(1.0, share) * (_EDGES[at] - _EDGES[at - 1])

    def moments(self) -> tuple[float, float]:
        """Mean and mean square of what was seen: the unseen would move them far."""
        if self._moments is None:
            total = sum(self._counts)
            shares = [count / total for count in self._counts]
            first = sum(share * middle for share, middle in zip(shares, _MIDDLES, strict=True))
            self._moments = first, sum(share * middle**2 for share, middle in zip(shares, _MIDDLES, strict=True))
        return self._moments


class Lengths:
    """The lengths of one model's answers, in tokens, by class."""

    def __init__(self) -> None:
        self._histograms = {qos_class: _Histogram() for qos_class in CLASSES}

    def observe(self, qos_class: QosClass, tokens: int) -> None:
        """An answer has ended by itself or at its limit, with so many tokens; not one whose client left."""
        if tokens > 0:
            self._histograms[qos_class].observe(tokens)

    def quantile(self, qos_class: QosClass, q: float, at_least: int = 0) -> int:
        """So long, or shorter, is a share ``q`` of the answers that are longer than ``at_least``."""
        histogram = self._histograms[qos_class]
        passed, total = histogram.up_to(at_least), histogram.sums()[-1]
        if at_least >= _EDGES[-1]:
            return at_least + 1
        return max(at_least + 1, math.ceil(histogram.length_at(passed + q * (total - passed)) - 1e-9))

    def ending(self, qos_class: QosClass, age: float) -> Callable[[float], float]:
        """How probably one that has ``age`` tokens has no more than so many to come, until the next observation."""
        if age >= _EDGES[-1]:
            return lambda _: 1.0
        up_to = self._histograms[qos_class].up_to
        passed = up_to(age)
        left = up_to(_EDGES[-1]) - passed
        return lambda tokens: (up_to(age + tokens) - passed) / left

    def moments(self, qos_class: QosClass) -> tuple[float, float]:
        """Mean and mean square of all answers."""
        return self._histograms[qos_class].moments()
