"""Whether a loop moves. A thread that is there but stands still answers nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: Somebody looks at least as often: the engine's own watch every second, the heartbeat of its process.
MOST_BETWEEN_LOOKS_S = 2.0


class AwakeClock:
    """Seconds in which this process ran. One that was stopped and goes on (a paused container, SIGSTOP, a machine that
    slept) has not stood still: nobody looked at the clock meanwhile, so such a time counts as the longest that may lie
    between two looks.

    Args:
        clock: seconds; tests give their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = clock()
        self._awake_s = 0.0

    def __call__(self) -> float:
        with self._lock:
            now = self._clock()
            self._awake_s += min(now - self._seen, MOST_BETWEEN_LOOKS_S)
            self._seen = now
            return self._awake_s


class Progress:
    """The heartbeat of a loop: written by its thread, read by any other.

    Args:
        clock: seconds; tests give their own.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or AwakeClock()
        self._advanced_at: float | None = None

    def advance(self) -> None:
        """The loop has work and goes on."""
        self._advanced_at = self._clock()

    def rest(self) -> None:
        """The loop has nothing to do."""
        self._advanced_at = None

    @property
    def stalled_s(self) -> float:
        """Seconds since the loop last went on; 0 while it has nothing to do."""
        advanced_at = self._advanced_at
        return 0.0 if advanced_at is None else self._clock() - advanced_at
