"""Rising load: the levels that were asked for, or twice as much each time until the knee, then closer to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise

from aim_profile.serving.evidence import Knee, Point, Slo
from aim_runtime.measure.figures import knee, overload

#: Doublings from the first level: 2^16 times it is beyond any server.
_MOST_DOUBLINGS = 16
_REFINEMENTS = 2

RunLevel = Callable[[float], Awaitable[Point | None]]


class Rising:
    """Runs levels and keeps their points in rising order.

    run: makes one level's point, None: there is no time left for it. whole: levels are whole numbers (clients).
    """

    def __init__(self, run: RunLevel, slo: Slo, *, whole: bool) -> None:
        self._run, self.slo, self._whole = run, slo, whole
        self.points: list[Point] = []
        self.out_of_time = False

    @property
    def knee(self) -> Knee | None:
        """Of the points so far."""
        return knee(self.points, self.slo)

    async def listed(self, levels: Sequence[float]) -> None:
        """Each of the levels, lowest first."""
        for level in sorted(set(levels)):
            if not await self._add(level):
                return

    async def until_the_knee(self, first: float) -> None:
        """Doubled until the knee, then in the middle between the last that was served well and the next, twice."""
        level = first
        for _ in range(_MOST_DOUBLINGS):
            if not await self._add(level):
                return
            if self.knee or not self.points[-1].valid or overload(self.points[-1], self.slo):
                break
            level *= 2
        for _ in range(_REFINEMENTS):
            between = self._between()
            if between is None or not await self._add(between):
                return

    def _between(self) -> float | None:
        found = self.knee
        after = next((b.offered for a, b in pairwise(self.points) if found and a.offered == found.offered), None)
        if found is None or after is None:
            return None
        middle = (found.offered + after) / 2
        middle = float(int(middle)) if self._whole else middle
        return None if middle in (found.offered, after) else middle

    async def _add(self, level: float) -> bool:
        made = await self._run(level)
        if made is None:
            self.out_of_time = True
            return False
        self.points = sorted([*self.points, made], key=lambda each: each.offered)
        return True
