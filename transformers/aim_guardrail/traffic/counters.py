"""Where is counted: in Redis for all replicas together, or here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from aim_guardrail.metrics import Metrics
from aim_guardrail.traffic.local import LocalWindows
from aim_guardrail.traffic.shared import SharedAway, SharedWindows
from aim_guardrail.traffic.windows import Charge, Standing


class Booking(NamedTuple):
    """What was taken, and where."""

    charge: Charge
    bucket: int
    is_shared: bool


class Taken(NamedTuple):
    """What came of asking for several charges at once; ``bookings`` are none where they were refused."""

    fits: bool
    stands: list[tuple[Charge, Standing]]
    bookings: list[Booking]


class CountersAway(Exception):
    """Redis does not count, and which share of the limits is this replica's nobody has said."""


class Counters:
    """A process's counters.

    Args:
        shared: Redis; without, this process counts alone.
        replicas: how many share the limits: alone, each may give so much less.
        clock: seconds since the epoch, for tests; Redis has its own.
    """

    def __init__(
        self,
        metrics: Metrics,
        shared: SharedWindows | None = None,
        replicas: int | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.local = LocalWindows()
        self._metrics, self._shared, self._replicas = metrics, shared, replicas
        self._clock = clock
        self._settling: set[asyncio.Task[None]] = set()

    def now_s(self) -> float:
        return (self._clock or time.time)()

    async def take(self, charges: Sequence[Charge]) -> Taken:
        """Take all, or nothing.

        Raises:
            CountersAway: nothing is known.
        """
        if self._shared is not None:
            try:
                answer = await self._shared.take(charges, self._their_ms())
            except SharedAway:
                charges = self._alone(charges)
            else:
                return self._taken(charges, *answer, is_shared=True)
        return self._taken(charges, *self.local.take(charges, self._now_ms()), is_shared=False)

    def settle(self, corrections: Sequence[tuple[Booking, int]]) -> None:
        """Add so much to what was taken; less than nothing is given back. In the background: no client waits for it."""
        here = [(each.charge, each.bucket, delta) for each, delta in corrections if delta and not each.is_shared]
        there = [(each.charge, each.bucket, delta) for each, delta in corrections if delta and each.is_shared]
        if here:
            self.local.settle(here, self._now_ms())
        if there:
            task = asyncio.ensure_future(self._settle_shared(there))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def close(self) -> None:
        """What is still to be settled is, as long as Redis answers."""
        await asyncio.gather(*self._settling)
        if self._shared is not None:
            await self._shared.close()

    async def _settle_shared(self, corrections: list[tuple[Charge, int, int]]) -> None:
        assert self._shared is not None
        try:
            await self._shared.settle(corrections, self._their_ms())
        except SharedAway:
            self._metrics.counted_without_redis("unsettled")

    def _alone(self, charges: Sequence[Charge]) -> list[Charge]:
        """The charges, of this replica's share of each limit. Raises CountersAway."""
        if self._replicas is None:
            raise CountersAway
        self._metrics.counted_without_redis("local")
        return [each._replace(share=max(1, each.limit // self._replicas)) for each in charges]

    def _taken(self, charges: Sequence[Charge], fits: bool, stands: list[Standing], *, is_shared: bool) -> Taken:
        pairs = list(zip(charges, stands, strict=True))
        bookings = [Booking(charge, stand.bucket, is_shared) for charge, stand in pairs] if fits else []
        return Taken(fits, pairs, bookings)

    def _now_ms(self) -> int:
        return int(self.now_s() * 1000)

    def _their_ms(self) -> int:
        return -1 if self._clock is None else self._now_ms()
