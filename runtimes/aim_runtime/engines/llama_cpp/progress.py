"""Whether a loop moves. A thread that is there but stands still answers nobody."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """The heartbeat of a loop: written by its thread, read by any other.

    Args:
        clock: seconds; tests give their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
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
