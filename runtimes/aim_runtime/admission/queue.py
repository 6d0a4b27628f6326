"""A scheduler on the event loop: whoever waits for a turn is woken by what gives it, one timer for what time gives.

A request has no task of its own here: its task waits for a future, and only where no turn is free at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from aim_kserve.errors import BadRequest, Overloaded, ServingError, Unavailable
from aim_runtime.engines.base import Usage
from aim_runtime.qos.request import Ask, Rejected
from aim_runtime.qos.scheduler import Scheduler
from aim_runtime.qos.ticket import Ticket

#: While requests wait, what those that run have delivered is looked at so often, at most.
_LOOK_S = 0.02
#: How long a request without a deadline waits for an engine that is being started again.
RESTART_S = 30.0
#: The message of the cancellation by which a call is aborted that will be made again.
_MAKE_WAY = "makes way for a more urgent request"


class Full(Overloaded):
    """This engine has no room for it in time; another one may."""


class Place:
    """One request in the queue, and then in the engine.

    ``charged``: tokens taken of its limits. ``size_bytes``: of its text.
    ``task``: makes its call, as long as it may be aborted and made again; None: it may not.
    """

    __slots__ = ("_aborted", "charged", "ended", "looked", "size_bytes", "task", "ticket", "turn", "usage")

    def __init__(self, ticket: Ticket, usage: Usage) -> None:
        self.ticket = ticket
        self.usage = usage
        self.turn: asyncio.Future[None] | None = None  # while it waits
        self.task: asyncio.Task[object] | None = None
        self.charged = self.size_bytes = 0
        self.looked = 0  # tokens the scheduler knows of
        self.ended = False
        self._aborted = False

    def abort(self) -> None:
        """End its call, for it to be made again."""
        if self.task is not None and not self._aborted:
            self._aborted = True
            self.task.cancel(_MAKE_WAY)

    def was_aborted(self) -> bool:
        """Asked by its task once it is cancelled: by :meth:`abort`, and by nobody else."""
        if not self._aborted or self.task is None:
            return False
        self._aborted = False
        return self.task.uncancel() == 0


class Queue:
    """See the module.

    Args:
        scheduler: of the engine; nobody else drives it.
        clock: the scheduler's.
        is_away: whether the engine is being started again; then nobody gets a turn until :meth:`back`.
        elsewhere: whether another engine would take those that wait then.
        replay: whether calls may be aborted and made again (``QosPolicy.replay``).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Callable[[], float],
        *,
        is_away: Callable[[], bool] = lambda: False,
        elsewhere: Callable[[], bool] = lambda: False,
        replay: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.replayed = 0  #: calls made again
        self._clock = clock
        self._is_away = is_away
        self._elsewhere = elsewhere
        self._away_s: float | None = None  # since when
        self._replay = replay
        self._places: dict[Ticket, Place] = {}
        self._waiting: set[Place] = set()
        self._timer: asyncio.Handle | None = None
        self._rings_s = 0.0  # when; a timer of uvloop's that is due at once cannot say it
        self._looked_s = float("-inf")

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    # --- a request's way ----------------------------------------------------------------------------------------

    def enter(self, ask: Ask, usage: Usage) -> Place:
        """Queue it. Follow with :meth:`turn`, and whatever happens with :meth:`leave`.

        Raises:
            Rejected: nothing has been queued.
        """
        ticket = self.scheduler.offer(ask) if self._is_away() else self.scheduler.begin(ask)
        place = self._places[ticket] = Place(ticket, usage)
        if ticket.state == "running":
            return place
        self.decide()
        if ticket.state == "waiting":
            place.turn = asyncio.get_running_loop().create_future()
            self._waiting.add(place)
            self._make_way()
            self._arm()
        return place

    async def turn(self, place: Place) -> None:
        """Return when the engine may be asked.

        Raises:
            ServingError: it is not going to be: nothing has been begun.
        """
        if place.turn is not None:
            try:
                await place.turn
            finally:
                self._waiting.discard(place)
                place.turn = None
        elif place.ticket.rejected is not None:
            raise too_late(place.ticket.rejected)

    def again(self, place: Place) -> None:
        """Its call has been aborted, and has ended: it waits once more. Follow with :meth:`turn`."""
        self.replayed += 1
        place.looked = 0
        place.usage.clear()
        self.scheduler.requeue(place.ticket)
        place.turn = asyncio.get_running_loop().create_future()
        self._waiting.add(place)
        self.decide()

    def first_token(self, place: Place) -> None:
        """Of a stream: it is here."""
        if not place.ended:
            if place.usage.prompt_tokens:
                self.scheduler.counted(place.ticket, place.usage.prompt_tokens, place.usage.cached_tokens)
            self.scheduler.first_token(place.ticket)

    def leave(self, place: Place, *, ok: bool) -> None:
        """It has ended, however; a second call does nothing. ok: with a whole answer."""
        if place.ended:
            return
        place.ended = True
        del self._places[place.ticket]
        if self._waiting:
            self._waiting.discard(place)
        if place.ticket.state == "running":
            usage = place.usage
            self.scheduler.settle(
                place.ticket, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, ok=ok
            )
        else:
            self.scheduler.cancel(place.ticket)
        if self._waiting:
            self.decide()

    # --- deciding -----------------------------------------------------------------------------------------------

    def decide(self) -> None:
        """Give every turn there is, and refuse whom none can be given in time any more."""
        if self._is_away():
            self._tell_dropped()
            self._wait_for_engine()
            return
        if self._waiting:
            self._catch_up()
        for ticket in self.scheduler.ready():
            self._wake(self._places[ticket])
        self._tell_dropped()
        if self._waiting:
            self._make_way()
            self._arm()

    def _tell_dropped(self) -> None:
        for ticket in self.scheduler.expired():
            place = self._places.get(ticket)
            if place is not None and ticket.rejected is not None:
                self._wake(place, too_late(ticket.rejected))

    @staticmethod
    def _wake(place: Place, refusal: ServingError | None = None) -> None:
        """One that does not wait yet sees it in its ticket."""
        if place.turn is None or place.turn.done():
            return
        if refusal is None:
            place.turn.set_result(None)
        else:
            place.turn.set_exception(refusal)

    def _catch_up(self) -> None:
        """Pull what has been delivered: a token tells nobody by itself."""
        now_s = self._clock()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        for ticket in self.scheduler.running():  # and not all places: thousands may wait
            place = self._places[ticket]
            delivered = place.usage.completion_tokens
            if delivered != place.looked:
                place.looked = delivered
                self.scheduler.progress(ticket, delivered)

    def _make_way(self) -> None:
        """Abort the one that is in the way of the first of those that wait, if calls may be made again. The scheduler
        names no other before that one is queued again."""
        blocked = self.scheduler.blocked() if self._replay else None
        victim = blocked and self.scheduler.victim(blocked)
        if victim is not None and (place := self._places.get(victim)) is not None:
            place.abort()

    # --- time ---------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """The one timer rings when time alone may change something. One that rings too early does no harm."""
        after_s = self._patience_s() if self._away_s is not None else self.scheduler.next_wake_s()
        if after_s is None or not self._waiting:
            return
        loop = asyncio.get_running_loop()
        due_s = loop.time() + max(0.001, after_s)
        if self._timer is not None:
            if self._rings_s <= due_s:
                return
            self._timer.cancel()
        self._timer, self._rings_s = loop.call_at(due_s, self._ring), due_s

    def _ring(self) -> None:
        self._timer = None
        if self._waiting:
            self.decide()

    # --- the engine's life --------------------------------------------------------------------------------------

    def _wait_for_engine(self) -> None:
        """Those that wait keep their places while it is started again, at most to their deadlines; where another
        engine would take them, they go there."""
        now_s = self._clock()
        if self._away_s is None:
            self._away_s = now_s
        goes = self._elsewhere()
        for place, until_s in self._until():
            if goes or until_s <= now_s:
                self._wake(place, Unavailable(_RESTARTING, code="engine_restarting", retry_after_s=5))
        self._arm()

    def _until(self) -> Iterator[tuple[Place, float]]:
        assert self._away_s is not None
        for place in self._waiting:
            slo_s = place.ticket.ask.ttft_slo_s
            latest_s = self._away_s + RESTART_S
            yield place, latest_s if slo_s is None else min(latest_s, place.ticket.arrived_s + slo_s)

    def _patience_s(self) -> float | None:
        return min((until_s for _, until_s in self._until()), default=self._clock()) - self._clock()

    def back(self, slots: int, kv_tokens: int | None) -> None:
        """The engine serves (again), and has so much room."""
        self._away_s = None
        self.scheduler.resize(slots, kv_tokens)
        self.decide()

    def close(self) -> None:
        """No turn is given any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def refuse_waiting(self, why: Callable[[], ServingError]) -> None:
        """Nobody who waits is going to be served here."""
        for place in self._waiting:
            self._wake(place, why())


_RESTARTING = "the engine is being started again, and this request has waited for it as long as it may: ask again"


def refused(rejected: Rejected) -> ServingError:
    """As its client is told who has not been queued."""
    if rejected.retry_after_s is None:
        return BadRequest(rejected.message, code=rejected.reason)
    kind = Full if rejected.reason in ("queue_full", "deadline") else Overloaded
    return kind(rejected.message, code=rejected.reason, retry_after_s=rejected.retry_after_s)


def too_late(rejected: Rejected) -> ServingError:
    """As its client is told who has waited, and cannot be served in time any more: a fault of the server."""
    return Unavailable(rejected.message, code=rejected.reason, retry_after_s=rejected.retry_after_s or 1.0)
