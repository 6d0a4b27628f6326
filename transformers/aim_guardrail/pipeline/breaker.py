"""A circuit breaker: who has failed several times in a row is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

FAILURES = 5
WAIT_S, LONGEST_WAIT_S = 1.0, 30.0


class Breaker:
    """Closed, it lets every call through. After ``FAILURES`` in a row it is open and lets none through for ``WAIT_S``;
    then it is half open: one call tells. If that fails, too, it is open for twice as long, up to ``LONGEST_WAIT_S``.

    For one event loop.

    Attributes:
        is_open: whether it is not closed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._wait_s = WAIT_S
        self._until_s = 0.0
        self._is_probing = False
        self.is_open = False

    def allows(self) -> bool:
        """Whether a call may be made now."""
        return not self.is_open or (not self._is_probing and self._clock() >= self._until_s)

    def begin(self) -> None:
        """A call that is allowed is made: one of `succeeded`, `failed`, `gave_up` follows."""
        self._is_probing = self.is_open

    def succeeded(self) -> None:
        self._failures, self._wait_s = 0, WAIT_S
        self.is_open = self._is_probing = False

    def failed(self) -> None:
        self._failures += 1
        if self.is_open and not self._is_probing:  # a call from before it opened
            return
        if self._is_probing:
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        if self._is_probing or self._failures >= FAILURES:
            self.is_open, self._is_probing = True, False
            self._until_s = self._clock() + self._wait_s

    def gave_up(self) -> None:
        """Nobody waited for how it ends: that tells nothing."""
        self._is_probing = False
