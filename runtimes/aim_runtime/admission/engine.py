"""An engine behind a queue: a request is put to it when it is its turn, so that its own queue stays empty.

What the scheduler does not hear of by itself is pulled: how many tokens have been delivered stands in the request's
``usage``, which the engine fills in. A streamed token passes nothing of ours.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from aim_kserve.access import current_log
from aim_kserve.errors import Unavailable
from aim_runtime.admission.estimate import Estimate, choices, max_tokens, text_bytes
from aim_runtime.admission.levels import CLASS_HEADER, PRIORITY, Level, Levels
from aim_runtime.admission.metrics import ClassMeters, Outcome, outcome_of
from aim_runtime.admission.queue import Place, Queue, refused
from aim_runtime.engines.base import (
    Engine,
    EngineStats,
    Json,
    Operation,
    RequestContext,
    StartsAgain,
    Stream,
    TakesAdapters,
    parks,
)
from aim_runtime.fields import Fields
from aim_runtime.qos.request import Ask, Rejected
from aim_runtime.qos.scheduler import Scheduler

#: Operations that generate: as many tokens as are asked for.
GENERATES = frozenset({"chat/completions", "chat/completions/batch", "completions", "responses"})
#: Those that compute one step: a turn, and no answer to wait for. All others (``tokenize``) cost the engine nothing.
ONE_STEP = frozenset(
    {
        *("embeddings", "pooling", "classify", "score", "rerank", "generative_scoring", "moderations"),
        *("audio/speech", "audio/transcriptions", "audio/translations", "images/generations"),
    }
)
_TAKE_TURNS = GENERATES | ONE_STEP
#: Until an engine in another process has told how many requests it computes at once.
_SLOTS_UNKNOWN = 8
_A_DAY_S = 86_400.0  # nobody is told to come back later than that
#: So often is asked whether the engine's capacity is still what it was.
_LOOK_S = 1.0


class Rates(Protocol):
    """:class:`aim_runtime.qos.buckets.Buckets`."""

    def take(self, model: str, qos_class: str, tenant: str, tokens: int) -> float: ...

    def settle(self, model: str, qos_class: str, tenant: str, *, charged: int, used: int) -> None: ...

    def give_back(self, model: str, qos_class: str, tenant: str, tokens: int) -> None: ...


#: Makes an engine's scheduler of its slots, KV tokens and whether it parks.
MakeScheduler = Callable[[int, int | None, bool], Scheduler]


class InTurn:
    """See the module; implements :class:`aim_runtime.engines.base.Engine`.

    Args:
        engine: not loaded yet.
        model: the served name.
        levels: of the model: which class, tenant and deadline a request has.
        make: its scheduler.
        meters: what is counted.
        rates: how many requests and tokens a minute there may be; shared by all engines. None: any.
        estimate: the model's.
        replay: ``QosPolicy.replay``.
        clock: seconds, the scheduler's.
    """

    #: Only there where the engine has them (see ``engines.base.TakesAdapters``).
    load_adapter: Callable[[str, Path], Awaitable[None]]
    unload_adapter: Callable[[str], Awaitable[None]]

    def __init__(
        self,
        engine: Engine,
        model: str,
        levels: Levels,
        make: MakeScheduler,
        meters: ClassMeters,
        rates: Rates | None,
        *,
        estimate: Estimate | None = None,
        replay: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.name = engine.name
        self.elsewhere: Callable[[], bool] = lambda: False  #: whether another replica would take those that wait
        self._model, self._levels, self._make = model, levels, make
        self._meters, self._rates = meters, rates
        self._estimate = estimate or Estimate()
        self._replay, self._clock = replay, clock
        self._again = engine if isinstance(engine, StartsAgain) else None  # asked at every decision
        self._queue: Queue | None = None
        self._looked_s = 0.0
        self._size: tuple[int, int | None] = (0, None)
        self._operations = _Turns(self)

    # --- what it is: the engine, but for the queue --------------------------------------------------------------

    @property
    def version(self) -> str:
        return self.engine.version

    @property
    def operations(self) -> Mapping[str, Operation]:
        return self._operations

    @property
    def requests(self) -> Mapping[str, Fields | None]:
        return self.engine.requests

    @property
    def adapters(self) -> tuple[str, ...]:
        return self.engine.adapters

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    def healthy(self) -> bool:
        return self.engine.healthy()

    def stats(self) -> EngineStats:
        """The engine's, with those that wait for a turn among its waiting ones."""
        stats = self.engine.stats()
        queued = self._queue.waiting if self._queue is not None else 0
        return replace(stats, waiting=stats.waiting + queued) if queued else stats

    def __getattr__(self, name: str) -> Any:
        """What some engines have besides (``load_seconds``)."""
        if name in ("engine", "load_adapter", "unload_adapter"):
            raise AttributeError(name)
        return getattr(self.engine, name)

    @property
    def queue(self) -> Queue | None:
        """Of the requests that wait; None before it is loaded."""
        return self._queue

    # --- life ---------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        await self.engine.load()
        self.name, self._size = self.engine.name, _size(self.engine)
        self._queue = Queue(
            self._make(*self._size, parks(self.engine)),
            self._clock,
            is_away=self._is_away,
            elsewhere=lambda: self.elsewhere(),
            replay=self._replay,
        )
        self._meters.watch(self._queue)
        if isinstance(self.engine, TakesAdapters):
            self.load_adapter, self.unload_adapter = self.engine.load_adapter, self.engine.unload_adapter
        if self._again is not None:
            self._again.on_ready = self._back

    def _is_away(self) -> bool:
        return self._again is not None and self._again.state == "restarting"

    def _back(self) -> None:
        self._size = _size(self.engine)
        if self._queue is not None:
            self._queue.back(*self._size)

    def _look(self, now_s: float) -> None:
        """Capacity that an engine tells late, or that has changed."""
        self._looked_s, size = now_s, _size(self.engine)
        if size != self._size and not self._is_away():
            self._back()

    async def drain(self, timeout_s: float) -> None:
        """Those that still wait for a turn have had their time (``Replica.drain``)."""
        if self._queue is not None:
            self._queue.refuse_waiting(lambda: Unavailable("the engine is shutting down", code="shutting_down"))
        await self.engine.drain(timeout_s)

    async def close(self) -> None:
        if self._queue is not None:
            self._queue.close()
            self._meters.unwatch(self._queue)
        await self.engine.close()

    # --- requests -----------------------------------------------------------------------------------------------

    async def run(self, name: str, body: Json, context: RequestContext) -> Json | Stream:
        """One operation, when it is its turn.

        Raises:
            ServingError: it is not going to be (429, 503), or the engine's own.
        """
        level = self._levels.of(body, context.headers)
        if self._queue is None or not self.engine.healthy():
            return await self.engine.operations[name](body, context)
        place = self._enter(self._queue, name, body, context, level)
        try:
            answer = await self._answer(self._queue, place, name, body, context)
        except BaseException as error:
            self._leave(place, outcome_of(error))
            raise
        if isinstance(answer, dict):
            self._leave(place, "whole")
            return answer
        return Turned(answer, partial(self._leave, place))

    def _enter(self, queue: Queue, name: str, body: Json, context: RequestContext, level: Level) -> Place:
        """Raises ServingError: it is refused, and nothing of it has been begun."""
        now_s = self._clock()
        if now_s - self._looked_s >= _LOOK_S:
            self._look(now_s)
        size_bytes, known = text_bytes(body)
        prompt_tokens = self._estimate.tokens(size_bytes, known)
        most, answers = (max_tokens(body), choices(body)) if name in GENERATES else (1, 1)
        charged = prompt_tokens + answers * (most or self._estimate.answer_tokens)
        # One that is wider than the engine gets all of it, and waits inside for nobody but itself.
        width = answers if answers < self._size[0] else self._size[0]
        ask = Ask(level.tenant, level.qos_class, prompt_tokens, most, width, level.ttft_slo_s, self._model)
        log = current_log()
        fields = log.fields
        fields["class"], fields["tenant"] = level.qos_class, level.tenant
        log.headers[CLASS_HEADER] = level.qos_class
        try:
            if self._rates is None:
                place = queue.enter(ask, context.usage)
            else:
                self._take(self._rates, level, charged)
                try:
                    place = queue.enter(ask, context.usage)
                except Rejected:
                    self._rates.give_back(self._model, level.qos_class, level.tenant, charged)
                    raise
        except Rejected as rejected:
            self._meters.rejected(level.qos_class, rejected.reason, level.ttft_slo_s)
            raise refused(rejected) from None
        if "queue_ms" not in fields:
            fields["queue_ms"] = 0.0
        place.charged, place.size_bytes = charged, size_bytes
        return place

    def _take(self, rates: Rates, level: Level, tokens: int) -> None:
        wait_s = min(_A_DAY_S, rates.take(self._model, level.qos_class, level.tenant, tokens))
        if wait_s:
            raise Rejected(
                "rate",
                f"tenant {level.tenant} has used up its requests or tokens of class {level.qos_class} for now: "
                f"ask again in {ceil(wait_s)} s",
                wait_s,
            )

    async def _answer(
        self, queue: Queue, place: Place, name: str, body: Json, context: RequestContext
    ) -> Json | Stream:
        while True:
            if place.turn is not None or place.ticket.rejected is not None:
                await queue.turn(place)
                self._note_turn(place)
            if self._replay:
                place.task = asyncio.current_task()
            try:
                return await self.engine.operations[name](body, self._as_served(queue, place, context))
            except asyncio.CancelledError:
                if not place.was_aborted():
                    raise
                queue.again(place)
            finally:
                place.task = None

    def _note_turn(self, place: Place) -> None:
        ticket, fields = place.ticket, current_log().fields
        if ticket.dispatched_s is not None:
            waited_ms = round((ticket.dispatched_s - ticket.arrived_s) * 1e3, 3)
            fields["queue_ms"] = max(waited_ms, fields.get("queue_ms", 0))

    @staticmethod
    def _as_served(queue: Queue, place: Place, context: RequestContext) -> RequestContext:
        context.moments.first_token = partial(queue.first_token, place)
        priority = PRIORITY[place.ticket.served_as]
        return context if priority == context.priority else replace(context, priority=priority)

    def _leave(self, place: Place, outcome: Outcome) -> None:
        if place.ended or self._queue is None:
            return
        usage = place.usage
        if self._rates is not None:
            used = usage.prompt_tokens + usage.completion_tokens
            ask = place.ticket.ask
            self._rates.settle(self._model, ask.qos_class, ask.tenant, charged=place.charged, used=used)
        if outcome == "whole":
            self._estimate.learn(place.size_bytes, usage.prompt_tokens, usage.completion_tokens)
        self._meters.left(place, outcome)
        self._queue.leave(place, ok=outcome == "whole")


class _Turns(Mapping[str, Operation]):
    """The engine's operations, those that compute in turn. Looked up per request."""

    def __init__(self, of: InTurn) -> None:
        self._of = of

    def __getitem__(self, name: str) -> Operation:
        operation = self._of.engine.operations[name]
        return partial(self._of.run, name) if name in _TAKE_TURNS else operation

    def __contains__(self, name: object) -> bool:
        return name in self._of.engine.operations

    def __iter__(self) -> Iterator[str]:
        return iter(self._of.engine.operations)

    def __len__(self) -> int:
        return len(self._of.engine.operations)


class Turned(AsyncGenerator[bytes, None]):
    """The engine's own stream, told of at its end.

    Whoever reads it does so inside ``with``, which gives the engine's own, before it is closed: so how it ended is
    known, and its chunks pass nothing of ours.
    """

    __slots__ = ("_chunks", "_end", "_outcome")

    def __init__(self, chunks: Stream, end: Callable[[Outcome], None]) -> None:
        self._chunks, self._end = chunks, end
        self._outcome: Outcome = "left"

    def __enter__(self) -> Stream:
        return self._chunks

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._outcome = "whole" if error is None else outcome_of(error)

    def __anext__(self) -> Coroutine[Any, Any, bytes]:
        return self._chunks.__anext__()

    def asend(self, value: None) -> Coroutine[Any, Any, bytes]:
        return self._chunks.asend(value)

    def athrow(self, *error: Any) -> Coroutine[Any, Any, bytes]:
        return self._chunks.athrow(*error)

    async def aclose(self) -> None:
        try:
            await self._chunks.aclose()
        finally:
            self._end(self._outcome)

    def __del__(self) -> None:
        self._end("left")  # of one that nobody has read; else it has ended


def followed(chunks: Stream) -> AbstractContextManager[Stream]:
    """``with followed(chunks) as stream:`` around their reading."""
    return chunks if isinstance(chunks, Turned) else nullcontext(chunks)


def bare(engine: Engine) -> Engine:
    """The engine without its queue, for what is no request of anybody's."""
    return engine.engine if isinstance(engine, InTurn) else engine


def _size(engine: Engine) -> tuple[int, int | None]:
    """Slots and KV tokens."""
    stats = engine.stats()
    return stats.slots_total or _SLOTS_UNKNOWN, stats.kv_tokens_total
