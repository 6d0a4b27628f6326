"""Whether a trial is still worth its device: what it is expected to gain, for each GPU-hour it still takes.

A trial that is at value `v` after a share `s` of its steps is expected to end at `v` times the median, over the trials
that came to their end, of (value at the end / value at share s). Its gain is by how much that beats the best end so
far, 0 where it does not; its cost are the GPU-hours of its steps so far, times what is left of them. Below the job's
minGainPerGpuHour the trial is stopped. Until one trial has come to its end nothing is expected and none is stopped.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median


@dataclass(slots=True)
class Curve:
    """A trial's measures in their order: shares of its steps (0, 1], values, GPU-hours spent by then."""

    shares: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    hours: list[float] = field(default_factory=list)

    def add(self, share: float, value: float, hours: float) -> None:
        self.shares.append(share)
        self.values.append(value)
        self.hours.append(hours)

    @property
    def is_over(self) -> bool:
        """Whether it came to its last step."""
        return bool(self.shares) and self.shares[-1] >= 1

    def at(self, share: float) -> float:
        """The value last measured by then; before the first measure, the first."""
        return self.values[max(0, bisect_right(self.shares, share) - 1)]


def gain_per_hour(curve: Curve, others: Mapping[str, Curve], *, minimize: bool) -> float | None:
    """Expected gain of going on, in the metric for each GPU-hour; None where nothing can be expected yet."""
    over = [other for other in others.values() if other.is_over and math.isfinite(other.values[-1])]
    if not over or not curve.shares or curve.is_over:
        return None
    share, value = curve.shares[-1], curve.values[-1]
    if not math.isfinite(value):
        return 0.0  # it diverged
    ratios = [other.values[-1] / other.at(share) for other in over if other.at(share)]
    if not ratios:
        return None
    ends = [other.values[-1] for other in over]
    expected = value * median(ratios)
    gain = min(ends) - expected if minimize else expected - max(ends)
    left = curve.hours[-1] * (1 - share) / share
    return max(0.0, gain) / left if left > 0 else None
