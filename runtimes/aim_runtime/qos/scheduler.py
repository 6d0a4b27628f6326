"""Who is dispatched to an engine next, who is refused, and who makes way. Pure over a clock; one per engine.

The caller offers a request, asks who is :meth:`Scheduler.ready` whenever something has changed, and tells what becomes
of those it has dispatched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from aim_kserve.identity.caller import QosClass

from .policy import QosPolicy
from .request import Ask, Rejected
from .ticket import Ticket


class Scheduler:
    """Args:
    policy: classes, tenants, deadlines.
    clock: seconds; never goes back.
    slots: answers that the engine computes side by side.
    kv_tokens: tokens that its KV cache holds; None: unknown, slots alone count.
    parks: the engine pauses a running request for a more urgent one while its slots are taken.
    """

    def __init__(
        self,
        policy: QosPolicy,
        clock: Callable[[], float],
        *,
        slots: int,
        kv_tokens: int | None = None,
        parks: bool = False,
    ) -> None:
        self._policy, self._clock = policy, clock
        self._slots, self._kv_tokens, self._parks = slots, kv_tokens, parks
        self._queue: list[Ticket] = []
        self._running: list[Ticket] = []
        self._expired: list[Ticket] = []
        self._numbers = 0

    def offer(self, ask: Ask) -> Ticket:
        """Its place in the queue.

        Raises:
            Rejected: ``too_large``, ``queue_full``, ``deadline``; nothing has been queued.
        """
        if ask.choices > self._slots:
            raise Rejected(
                "too_large", f"{ask.choices} answers at once are more than the {self._slots} there is room for", None
            )
        if (
            sum(ticket.ask.qos_class == ask.qos_class for ticket in self._queue)
            >= self._policy.of(ask.qos_class).max_waiting
        ):
            raise Rejected("queue_full", f"as many requests of class {ask.qos_class} wait as may", 1.0)
        self._numbers += 1
        ticket = Ticket(self._numbers, ask, self._clock(), ask.qos_class)
        self._queue.append(ticket)
        return ticket

    def ready(self) -> list[Ticket]:
        """Those to be dispatched now, each of them once; from now on they count as running."""
        dispatched = []
        while self._queue and self._used() + self._queue[0].ask.choices <= self._slots:
            ticket = self._queue.pop(0)
            ticket.state, ticket.dispatched_s = "running", self._clock()
            self._running.append(ticket)
            dispatched.append(ticket)
        return dispatched

    def expired(self) -> list[Ticket]:
        """Those that were dropped since it was last asked, because their deadline cannot be kept any more:
        ``Ticket.rejected`` says why."""
        dropped, self._expired = self._expired, []
        return dropped

    def counted(self, ticket: Ticket, prompt_tokens: int, cached_tokens: int) -> None:
        """The engine has counted its prompt, and found so many of its tokens cached."""
        ticket.prompt_tokens, ticket.cached_tokens = prompt_tokens, cached_tokens

    def first_token(self, ticket: Ticket) -> None:
        """Its first token has come: its prompt is computed."""
        ticket.first_token_s = self._clock()

    def progress(self, ticket: Ticket, tokens: int) -> None:
        """So many tokens have been delivered so far, of all its answers together."""
        ticket.delivered = max(ticket.delivered, tokens)

    def done(self, ticket: Ticket, ok: bool) -> None:
        """It has ended. ok: as it should; its length and times then count for predictions."""
        self._leave(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Its client has gone, wherever it stands; of one that has ended nothing changes."""
        self._leave(ticket)

    def victim(self, ticket: Ticket) -> Ticket | None:
        """Who should be aborted and replayed (:meth:`requeue`) so that this waiting one can run. None: nobody, or
        the last victim has not been requeued yet."""
        return None

    def requeue(self, ticket: Ticket) -> None:
        """A victim was aborted before it sent anything: it waits again, at the place of its arrival."""
        self._leave(ticket)
        ticket.state, ticket.dispatched_s = "waiting", None
        self._queue.insert(0, ticket)

    def resize(self, slots: int, kv_tokens: int | None) -> None:
        """The engine has other capacity now; what runs there keeps its own."""
        self._slots, self._kv_tokens = slots, kv_tokens

    def next_wake_s(self) -> float | None:
        """In how many seconds :meth:`ready` must be asked again though nothing happens; None: never."""
        return None

    def waiting(self) -> Mapping[tuple[QosClass, str], int]:
        """How many wait, by class and tenant."""
        return Counter((ticket.ask.qos_class, ticket.ask.tenant) for ticket in self._queue)

    def running(self) -> list[Ticket]:
        """Those dispatched that have not ended, earliest dispatched first."""
        return list(self._running)

    def _used(self) -> int:
        return sum(ticket.ask.choices for ticket in self._running)

    def _leave(self, ticket: Ticket) -> None:
        for place in (self._queue, self._running):
            if ticket in place:
                place.remove(ticket)
        ticket.state = "ended"
