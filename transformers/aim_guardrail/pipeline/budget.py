"""What a detector's next answer is expected to take, by what its last ones took: whether asking is worth it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

#: The weight of the newest answer, as of a round trip's in https://www.rfc-editor.org/rfc/rfc6298#section-2.
WEIGHT = 1 / 8
#: Fewer answers than that say nothing yet: a model's first is often its slowest.
LEAST_ANSWERS = 8
#: A detector whose answers would come late is asked all the same once in so many seconds: it may be quick again.
PROBE_EVERY_S = 1.0


@dataclass(slots=True)
class _Seen:
    """Of texts of one size."""

    mean_s: float = 0.0
    answers: int = 0
    asked_s: float = float("-inf")


class Estimate:
    """The mean time of a detector's answers, the last counting most, for texts of each size (a factor of 4 apart).

    The mean, not a high percentile: what is skipped is refused or passes unchecked, so a detector is only skipped that
    will more likely than not be late. For one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[int, _Seen] = {}

    def expected_s(self, chars: int) -> float | None:
        """For texts of that many characters together; None while too little is known."""
        seen = self._seen.get(_size(chars))
        return None if seen is None or seen.answers < LEAST_ANSWERS else seen.mean_s

    def allows(self, chars: int, left_s: float) -> bool:
        """Whether to ask: its answer fits into what is left, or it is time to see whether it does again."""
        if left_s <= 0:
            return False
        seen = self._seen.setdefault(_size(chars), _Seen())
        now = self._clock()
        if seen.answers >= LEAST_ANSWERS and seen.mean_s > left_s and now - seen.asked_s < PROBE_EVERY_S:
            return False
        seen.asked_s = now
        return True

    def answered(self, chars: int, seconds: float, left_s: float) -> None:
        """It took so long, of ``left_s`` that there were. Where that was not expected to be enough, things have
        changed: what was before counts no more."""
        seen = self._seen.setdefault(_size(chars), _Seen())
        if seen.answers >= LEAST_ANSWERS and seen.mean_s > left_s:
            seen.answers = 0
        seen.answers += 1
        seen.mean_s += (seconds - seen.mean_s) * max(WEIGHT, 1 / seen.answers)

    def timed_out(self, chars: int, seconds: float) -> None:
        """It had not answered by then. How long it would have taken nobody knows; it counts as twice as long, as a
        packet whose acknowledgement did not come (RFC 6298, 5.5), and never as good news."""
        seen = self._seen.setdefault(_size(chars), _Seen())
        seen.answers += 1
        if 2 * seconds > seen.mean_s:
            seen.mean_s += (2 * seconds - seen.mean_s) * max(WEIGHT, 1 / seen.answers)


def _size(chars: int) -> int:
    return (chars.bit_length() + 1) // 2
