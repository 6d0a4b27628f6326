"""What the classes below high are served at least, even while high alone could fill the engine.

Strict order starves whoever stands below. So the work done is counted in two accounts over the last one to two
``ageing_s``; while somebody below has waited for longer than that and their account is less than ``floor`` of both, one
of them is served as if it were high. While their account is too small nobody below is paused for a more urgent one.
"""

from __future__ import annotations

from .fair import W_OUT, work_of
from .ticket import Ticket


class Floor:
    """share: of the work done, 0 to 1. window_s: over which it is counted."""

    def __init__(self, share: float, window_s: float) -> None:
        self._share, self._window_s = share, window_s
        self._since_s = 0.0
        self._below = [0.0, 0.0]  # this window, the last one
        self._all = [0.0, 0.0]
        self._promised: dict[int, float] = {}  # number of one served so → what it is thought to cost still

    def owes(self, now_s: float) -> bool:
        """Whether those below have got less than their share, what was begun for them included."""
        self._turn(now_s)
        begun = sum(self._promised.values())
        return sum(self._below) + begun < self._share * (sum(self._all) + begun)

    def begin(self, ticket: Ticket) -> None:
        """It is served out of turn: what it is going to cost counts at once, or a second one would follow it."""
        self._promised[ticket.number] = work_of(ticket)

    def charge(self, ticket: Ticket, cost: float, now_s: float) -> None:
        """So much was done for it."""
        if now_s - self._since_s >= self._window_s:
            self._turn(now_s)
        self._all[0] += cost
        if ticket.level != "high":
            self._below[0] += cost
        if ticket.number in self._promised:
            self._promised[ticket.number] = max(W_OUT, self._promised[ticket.number] - cost)

    def end(self, ticket: Ticket) -> None:
        """It runs no longer."""
        self._promised.pop(ticket.number, None)

    def _turn(self, now_s: float) -> None:
        if now_s - self._since_s < self._window_s:
            return
        kept = now_s - self._since_s < 2 * self._window_s
        for account in (self._below, self._all):
            account[1] = account[0] if kept else 0.0
            account[0] = 0.0
        self._since_s = now_s
