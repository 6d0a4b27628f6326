"""Counts in this process: of a single replica, or of one that is cut off from the others."""

from __future__ import annotations

from collections.abc import Sequence

from aim_guardrail.traffic.windows import Charge, Standing, Window, standing, taken

#: Counts kept at once. Whoever comes when there is no room is counted together with all others who do: made-up callers
#: cost no memory, and push nobody's count out.
MAX_KEYS = 10_000
#: Looking for counts that have run out takes a millisecond: not more often.
_SWEEP_EVERY_MS = 1_000


class LocalWindows:
    """Not thread-safe: it is the event loop's. ``max_keys``: how many counts are kept."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._counts: dict[str, dict[int, int]] = {}
        self._ends_ms: dict[str, int] = {}
        self._max_keys = max_keys
        self._swept_ms = -_SWEEP_EVERY_MS

    def __len__(self) -> int:
        return len(self._counts)

    def take(self, charges: Sequence[Charge], now_ms: int) -> tuple[bool, list[Standing]]:
        """Take all, or nothing. Each limit is what this process may give: the charge's share where it has one."""
        counts = [self._of(charge, now_ms) for charge in charges]
        stands = [
            standing(count, charge, limit_of(charge), now_ms) for count, charge in zip(counts, charges, strict=True)
        ]
        if any(stand.wait_ms for stand in stands):
            return False, stands
        for count, charge, stand in zip(counts, charges, stands, strict=True):
            self._add(count, stand.bucket, charge.cost)
            self._drop_old(count, charge.window, now_ms)
        return True, [taken(stand, charge, now_ms) for stand, charge in zip(stands, charges, strict=True)]

    def settle(self, corrections: Sequence[tuple[Charge, int, int]], now_ms: int) -> None:
        """Correct what was taken: charge, bucket, delta. What is given back goes to its bucket, more is taken now."""
        for charge, bucket, delta in corrections:
            count = self._of(charge, now_ms)
            if delta > 0:
                self._add(count, charge.window.bucket(now_ms), delta)
            elif count.get(bucket, 0) > 0:
                count[bucket] = max(0, count[bucket] + delta)

    def _of(self, charge: Charge, now_ms: int) -> dict[int, int]:
        key = charge.key
        if key not in self._counts and not self._has_room(now_ms):
            key = charge.others
        self._ends_ms[key] = now_ms + (charge.window.buckets + 1) * charge.window.width_ms
        return self._counts.setdefault(key, {})

    def _has_room(self, now_ms: int) -> bool:
        if len(self._counts) < self._max_keys:
            return True
        if now_ms - self._swept_ms >= _SWEEP_EVERY_MS:
            self._swept_ms = now_ms
            for key in [key for key, end_ms in self._ends_ms.items() if end_ms <= now_ms]:
                del self._counts[key], self._ends_ms[key]
        return len(self._counts) < self._max_keys

    @staticmethod
    def _add(count: dict[int, int], bucket: int, cost: int) -> None:
        if cost:
            count[bucket] = count.get(bucket, 0) + cost

    @staticmethod
    def _drop_old(count: dict[int, int], window: Window, now_ms: int) -> None:
        if len(count) > window.buckets:
            for bucket in [bucket for bucket in count if bucket < window.oldest(now_ms)]:
                del count[bucket]


def limit_of(charge: Charge) -> int:
    """What one process may give."""
    return charge.limit if charge.share is None else charge.share
