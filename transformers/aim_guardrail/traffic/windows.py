"""How much was used lately: counts in buckets of a window that moves. Pure.

A count is kept for each of a window's buckets (60 of a second for a minute), and a bucket counts for as long as any of
it lies within the window. So no time of a window's length, wherever it begins, ever holds more than the limit; what is
used comes free up to one bucket late. Memory is bounded by the buckets, whatever the limit is, and what was taken can
be given back to the bucket it was taken from, which a list of entries or a single theoretical arrival time cannot.
`take.lua` is the same for Redis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from aim_guardrail.detectors.traffic import Span


@dataclass(frozen=True, slots=True)
class Window:
    """A window of `buckets` times `width_ms` milliseconds."""

    width_ms: int
    buckets: int

    def bucket(self, now_ms: int) -> int:
        """The number of the bucket that is open."""
        return now_ms // self.width_ms

    def oldest(self, now_ms: int) -> int:
        """The number of the oldest bucket that counts."""
        return self.bucket(now_ms) - self.buckets

    def free_ms(self, bucket: int, now_ms: int) -> int:
        """Milliseconds until a bucket no longer counts."""
        return (bucket + 1 + self.buckets) * self.width_ms - now_ms


WINDOWS: Mapping[Span, Window] = {
    "minute": Window(1_000, 60),
    "hour": Window(30_000, 120),
    "day": Window(900_000, 96),
}


class Charge(NamedTuple):
    """What a request takes of one limit.

    ``key``: whose count; ``others``: the count of all for whom there is no room any more; ``share``: of ``limit``,
    which is all replicas' together, what one of them may give alone (None: that is not known).
    """

    key: str
    others: str
    limit: int
    cost: int
    window: Window
    share: int | None = None


class Standing(NamedTuple):
    """How a limit stands for who asks.

    ``used``: within the window, what this request took included; ``wait_ms``: until its cost fits: 0: now, -1: never;
    ``reset_ms``: until nothing of what is used counts any more; ``bucket``: where it was taken.
    """

    used: int
    wait_ms: int
    reset_ms: int
    bucket: int


def standing(counts: Mapping[int, int], charge: Charge, limit: int, now_ms: int) -> Standing:
    """How ``limit`` stands before ``charge`` is taken, by the counts of buckets."""
    window, oldest = charge.window, charge.window.oldest(now_ms)
    live = sorted((bucket, count) for bucket, count in counts.items() if bucket >= oldest and count)
    used = sum(count for _, count in live)
    reset_ms = window.free_ms(live[-1][0], now_ms) if live else 0
    return Standing(
        used, _wait_ms(live, used + charge.cost - limit, charge, limit, now_ms), reset_ms, window.bucket(now_ms)
    )


def _wait_ms(live: list[tuple[int, int]], over: int, charge: Charge, limit: int, now_ms: int) -> int:
    """How long until ``over`` of what is used has come free."""
    if charge.cost > limit:
        return -1
    for bucket, count in live:
        if over <= 0:
            break
        over -= count
        if over <= 0:
            return charge.window.free_ms(bucket, now_ms)
    return 0


def taken(before: Standing, charge: Charge, now_ms: int) -> Standing:
    """The same once the charge has been taken."""
    if not charge.cost:
        return before
    return before._replace(used=before.used + charge.cost, reset_ms=charge.window.free_ms(before.bucket, now_ms))
