"""How many requests of a batch are on their way at once: as many as the server takes. Pure over a clock.

Additive increase, multiplicative decrease (Chiu and Jain 1989): one more for every round that was answered, half as
many when the server refuses for want of room, and nothing is sent before the time that it asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 60.0
#: A pause is up to so much longer than asked for: not everybody comes back in the same instant.
_JITTER = 0.25


class Pace:
    """Args:
    most: requests at once, whatever the server takes.
    start: with so many it begins.
    clock: seconds.
    rng: for the jitter of pauses.
    """

    def __init__(self, most: int, start: int, clock: Callable[[], float], rng: Random) -> None:
        self._most, self._clock, self._rng = most, clock, rng
        self.at_once = float(min(start, most))
        self._resumes_s = self._slowed_s = float("-inf")
        self._refused_in_a_row = 0

    def room(self, on_their_way: int) -> bool:
        """Whether one more may be sent now."""
        return on_their_way < int(self.at_once) and self.pause_s() == 0.0

    def pause_s(self) -> float:
        """For so long nothing is sent."""
        return max(0.0, self._resumes_s - self._clock())

    def answered(self) -> None:
        """One got an answer."""
        self._refused_in_a_row = 0
        self.at_once = min(float(self._most), self.at_once + 1 / self.at_once)

    def refused(self, sent_s: float, retry_after_s: float | None) -> None:
        """The server has no room, or cannot be reached. Those that were sent before it last said so say nothing new.

        Args:
            sent_s: when the request was sent, by the clock.
            retry_after_s: what the server asks for; None: a second, and twice as long each time in a row.
        """
        now = self._clock()
        if sent_s > self._slowed_s:
            self.at_once = max(1.0, self.at_once / 2)
            self._refused_in_a_row += 1
            self._slowed_s = now
        if retry_after_s is None:
            retry_after_s = min(_LONGEST_PAUSE_S, 2.0 ** min(10, self._refused_in_a_row - 1))
        pause_s = max(_SHORTEST_PAUSE_S, retry_after_s) * (1 + _JITTER * self._rng.random())
        self._resumes_s = max(self._resumes_s, now + pause_s)
