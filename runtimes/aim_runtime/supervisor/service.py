"""The engine's side of the socket: requests in, what the engine makes of them out, a heartbeat between."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, cast

from aim_kserve.errors import ServingError, Unavailable, internal_error
from aim_runtime.engines.base import Engine, RequestContext, Stream, TakesAdapters, Usage

from .errors import to_frame
from .frames import (
    NOTHING,
    WINDOW_BYTES,
    Abort,
    Answer,
    Ask,
    Beat,
    Chunks,
    Close,
    Credit,
    Dropped,
    Ended,
    Garbage,
    LoadAdapter,
    Opened,
    Reader,
    Spent,
    ToEngine,
    UnloadAdapter,
    Unread,
    encode,
)

logger = logging.getLogger("aim.child")

BEAT_S = 0.25  #: between two beats while there is work
IDLE_BEAT_S = 1.0
Work = Callable[[], Awaitable[None]]
_RETRY_S = 5
_FRESH_S = 0.05  #: with what streams bring, figures are sent along when they are older than this


class _Outgoing:
    """One request's stream on its way out: what is new since the last frame, and how much its reader has not read."""

    __slots__ = ("call", "chunks", "room", "unread", "usage")

    def __init__(self, call: int, usage: Usage) -> None:
        self.call = call
        self.usage = usage
        self.chunks: list[bytes] = []
        self.unread = 0
        self.room = asyncio.Event()


class Service(asyncio.Protocol):
    """Runs requests on an engine. ``over`` is done when the parent says ``Close`` or is gone."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.over: asyncio.Future[Close | None] = self._loop.create_future()
        self._reader = Reader(ToEngine)
        self._transport: asyncio.WriteTransport | None = None
        self._outbox: list[Any] = []
        self._flushing = False
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, _Outgoing] = {}
        self._engine: Engine | None = None
        self._beating: asyncio.Task[None] | None = None
        self._beaten_at = 0.0

    def start(self, engine: Engine) -> None:
        """The engine is loaded: requests may come."""
        self._engine = engine
        self._beating = self._loop.create_task(self._beat_regularly())

    @property
    def takes_adapters(self) -> bool:
        return isinstance(self._engine, TakesAdapters)

    # --- in -----------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are of no such class

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except Garbage:
            logger.exception("the parent cannot be understood")
            self.connection_lost(None)

    def _take(self, message: Any) -> None:
        if isinstance(message, Ask):
            self._run(message.call, partial(self._answer, message))
        elif isinstance(message, Unread):
            self.send(to_frame(message.call, _no_memory(), NOTHING))
        elif isinstance(message, Credit):
            stream = self._streams.get(message.call)
            if stream is not None:
                stream.unread -= message.bytes_read
                stream.room.set()
        elif isinstance(message, Abort):
            task = self._tasks.get(message.call)
            if task is None:
                self.send(Dropped(message.call))  # its answer is on its way
            else:
                task.cancel()
                task.add_done_callback(lambda _: self.send(Dropped(message.call)))
        elif isinstance(message, LoadAdapter):
            load = partial(self._change_adapters, message.call, "load_adapter", message.name, Path(message.path))
            self._run(message.call, load)
        elif isinstance(message, UnloadAdapter):
            self._run(message.call, partial(self._change_adapters, message.call, "unload_adapter", message.name))
        elif isinstance(message, Close) and not self.over.done():
            self.over.set_result(message)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _run(self, call: int, work: Work) -> None:
        task = self._tasks[call] = self._loop.create_task(self._told(call, work))
        task.add_done_callback(lambda _: self._forget(call))

    def _forget(self, call: int) -> None:
        """Not in the task itself: one that is cancelled before it has begun runs nothing, not even a ``finally``."""
        del self._tasks[call]
        self._streams.pop(call, None)

    async def _told(self, call: int, work: Work) -> None:
        """Run ``work``; whatever it raises, the parent hears of it."""
        try:
            await work()
        except ServingError as error:
            self.send(to_frame(call, error, self._spent(call)))
        except MemoryError:
            logger.error("request %d failed: there is not enough memory for it", call)
            self.send(to_frame(call, _no_memory(), self._spent(call)))
        except Exception:
            # The edge of one request: the others go on, the parent's client is told where the cause is.
            logger.exception("request %d failed", call)
            unknown = internal_error()
            self.send(to_frame(call, unknown, self._spent(call)))

    def _spent(self, call: int) -> Spent:
        stream = self._streams.get(call)
        return _spent_of(stream.usage) if stream is not None else NOTHING

    async def _answer(self, ask: Ask) -> None:
        assert self._engine is not None  # nobody asks before it is loaded
        context = RequestContext(ask.request_id, ask.headers, ask.priority, ask.timeout_s)
        stream = self._streams[ask.call] = _Outgoing(ask.call, context.usage)
        answer = await self._engine.operations[ask.operation](ask.body, context)
        if isinstance(answer, dict):
            self.send(Answer(ask.call, answer, _spent_of(context.usage), context.ignored))
            return
        self.send(Opened(ask.call, context.ignored))
        await self._pump(answer, stream)
        self.send(Ended(ask.call))

    async def _pump(self, chunks: Stream, stream: _Outgoing) -> None:
        """Pass a stream on, no faster than its reader reads: an engine merges what is not fetched, or waits with it."""
        async with aclosing(chunks):
            async for chunk in chunks:
                if not stream.chunks:
                    self.send(stream)
                stream.chunks.append(chunk)
                stream.unread += len(chunk)
                while stream.unread >= WINDOW_BYTES:
                    stream.room.clear()
                    await stream.room.wait()

    async def _change_adapters(self, call: int, action: str, *arguments: Any) -> None:
        engine: Any = self._engine
        await getattr(engine, action)(*arguments)
        self.send(Ended(call, tuple(engine.adapters)))

    # --- out ----------------------------------------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        """Put a message (or a stream that has something new) into the frame that this pass of the loop sends."""
        self._outbox.append(message)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        outbox, self._outbox = self._outbox, []
        messages = [_chunks_of(each) if type(each) is _Outgoing else each for each in outbox]
        if self._engine is not None and time.monotonic() - self._beaten_at > _FRESH_S:
            messages.append(self._beat())
        if self._transport is None or self._transport.is_closing():
            return
        try:
            self._transport.write(encode(messages))
        except ServingError as error:
            self._refuse_unsendable(messages, error)

    def _refuse_unsendable(self, messages: list[Any], error: ServingError) -> None:
        """One answer cannot be encoded, or is too large: the others must not suffer."""
        assert self._transport is not None
        for message in messages:
            try:
                frame = encode([message])
            except ServingError:
                logger.error("an answer cannot be passed on: %s", error)
                refusal = ServingError("the engine's answer cannot be passed on", code="answer_unsendable")
                frame = encode([to_frame(message.call, refusal, NOTHING)])
            self._transport.write(frame)

    def _beat(self) -> Beat:
        assert self._engine is not None
        self._beaten_at = time.monotonic()
        return Beat(self._engine.healthy(), self._engine.stats())

    async def _beat_regularly(self) -> None:
        while True:
            self.send(self._beat())
            await asyncio.sleep(BEAT_S if self._tasks else IDLE_BEAT_S)


def _no_memory() -> Unavailable:
    return Unavailable(
        "the engine has not enough memory left for this request: ask again, or send less at once",
        code="memory_full",
        retry_after_s=_RETRY_S,
    )


def _chunks_of(stream: _Outgoing) -> Chunks:
    chunks, stream.chunks = stream.chunks, []
    return Chunks(stream.call, chunks, _spent_of(stream.usage))


def _spent_of(usage: Usage) -> Spent:
    return usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.queue_s, usage.prefill_s
