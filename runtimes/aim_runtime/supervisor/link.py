"""Our end of the socket: calls out, their answers back to whoever waits, the heartbeat."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

from aim_kserve.errors import ServingError
from aim_runtime.engines.base import Json, RequestContext, Usage

from .errors import from_frame
from .frames import (
    WINDOW_BYTES,
    Abort,
    Answer,
    Ask,
    Beat,
    Chunks,
    Credit,
    Dropped,
    Ended,
    Failed,
    FromEngine,
    Garbage,
    Loaded,
    LoadFailed,
    Opened,
    Reader,
    Spent,
    encode,
)

#: As long the engine may take to let go of what was aborted; whoever waits for it goes on then.
DROP_S = 5.0


class Call:
    """One request that the engine has not answered to the end."""

    __slots__ = ("_loop", "_waiter", "chunks", "context", "error", "number", "over", "reply", "unread")

    def __init__(self, number: int, context: RequestContext, loop: asyncio.AbstractEventLoop) -> None:
        self.number = number
        self.context = context
        self.reply: asyncio.Future[Any] = loop.create_future()  # Answer, Opened or Ended
        self.chunks: deque[bytes] = deque()
        self.unread = 0  # bytes taken out of ``chunks`` that the engine has not been told of
        self.error: ServingError | None = None
        self.over = False
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None

    def answer(self, message: Any) -> None:
        if not self.reply.done():
            self.reply.set_result(message)

    def sent(self, chunks: list[bytes]) -> bool:
        """Whether they could be sent past the reader, who waits for them."""
        waits = self._waiter is not None and not self._waiter.done()
        return waits and self.context.shortcut.offer(chunks)

    def add(self, chunks: list[bytes]) -> None:
        self.chunks.extend(chunks)
        self._wake()

    def end(self, error: ServingError | None = None) -> None:
        """Nothing more comes."""
        self.over, self.error = True, error
        if error is not None and not self.reply.done():
            self.reply.set_exception(error)
        self._wake()

    async def wait(self) -> None:
        """Until there is something in ``chunks``, or nothing more comes."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Link(asyncio.Protocol):
    """The connection to one process.

    Args:
        on_loaded: with Loaded or LoadFailed.
        on_beat: with every Beat.
        on_lost: with the reason in words: the connection is gone, most likely with the process.
        on_garbage: with the reason in words: the process is there, but cannot be talked to.
    """

    def __init__(
        self,
        *,
        on_loaded: Callable[[Loaded | LoadFailed], None],
        on_beat: Callable[[Beat], None],
        on_lost: Callable[[str], None],
        on_garbage: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = Reader(FromEngine)
        self._transport: asyncio.WriteTransport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._on_loaded, self._on_beat, self._on_lost = on_loaded, on_beat, on_lost
        self._on_garbage = on_garbage
        self._numbers = 0
        self.calls: dict[int, Call] = {}
        self._leaving: dict[int, asyncio.Future[None]] = {}
        self.heard_at = time.monotonic()

    # --- out ----------------------------------------------------------------------------------------------------------

    async def ask(self, operation: str, body: Json, context: RequestContext) -> Json | Stream:
        """Put a request to the engine and wait until it has accepted it (a stream) or answered it.

        Raises:
            ServingError: the engine's own, or why it cannot be asked.
        """
        call = self._begin(context)
        headers = context.passed_on()
        ask = Ask(call.number, operation, body, context.request_id, headers, context.priority, context.timeout_s)
        reply = await self._reply(call, ask)
        if isinstance(reply, Answer):
            context.ignored.extend(reply.ignored)
            return reply.body
        context.ignored.extend(reply.ignored)
        return Stream(self, call)

    async def change_adapters(self, message: Callable[[int], Any]) -> tuple[str, ...]:
        """Send what ``message`` makes of the call's number; returns the adapters there are afterwards."""
        call = self._begin(RequestContext(""))
        reply: Ended = await self._reply(call, message(call.number))
        return reply.adapters or ()

    def _begin(self, context: RequestContext) -> Call:
        self._numbers += 1
        return Call(self._numbers, context, self._loop)

    async def _reply(self, call: Call, message: Any) -> Any:
        frame = encode([message])
        self.calls[call.number] = call
        try:
            await self._writable.wait()  # a process that does not read: whoever asks waits, nothing piles up
            self.write(frame)
            return await call.reply
        except BaseException:
            await self.leave(call)
            raise

    def send(self, message: Any) -> None:
        self.write(encode([message]))

    def write(self, frame: bytearray) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def abandon(self, call: Call) -> None:
        """Nobody waits for this any more."""
        if self.calls.pop(call.number, None) is not None and not call.over:
            self._leaving[call.number] = self._loop.create_future()
            self.send(Abort(call.number))

    async def leave(self, call: Call) -> None:
        """... and when this returns, nothing of it is left in the engine: its slot is free. It takes DROP_S at most."""
        self.abandon(call)
        dropped = self._leaving.get(call.number)
        if dropped is not None:
            await asyncio.wait([dropped], timeout=DROP_S)

    def read(self, call: Call, size: int) -> None:
        """The client has taken ``size`` bytes of a stream."""
        call.unread += size
        if call.unread >= WINDOW_BYTES // 2 and not call.over:
            self.send(Credit(call.number, call.unread))
            call.unread = 0

    def fail_all(self, why: Callable[[], ServingError]) -> int:
        """End every call with an error of its own; returns how many there were."""
        calls, self.calls = self.calls, {}
        for call in calls.values():
            call.end(why())
        for number in list(self._leaving):
            self._dropped(number)
        self._writable.set()
        return len(calls)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- in -----------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are of no such class

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost("has closed its connection")

    def data_received(self, data: bytes) -> None:
        self.heard_at = time.monotonic()
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except Garbage as error:
            self._on_garbage(f"sent what cannot be understood ({error})")
            self.close()

    def _take(self, message: Any) -> None:
        kind = type(message)
        if kind is Beat:
            self._on_beat(message)
            return
        if kind is Loaded or kind is LoadFailed:
            self._on_loaded(message)
            return
        if kind is Dropped:
            self._dropped(message.call)
            return
        call = self.calls.get(message.call)
        if call is None:  # its client has left
            return
        if kind is Chunks:
            _count(call.context.usage, message.spent)
            if call.sent(message.chunks):
                self.read(call, sum(map(len, message.chunks)))
            else:
                call.add(message.chunks)
        elif kind is Opened:
            call.answer(message)
        else:
            self._finish(call, message)

    def _dropped(self, number: int) -> None:
        dropped = self._leaving.pop(number, None)
        if dropped is not None and not dropped.done():
            dropped.set_result(None)

    def _finish(self, call: Call, message: Answer | Ended | Failed) -> None:
        del self.calls[call.number]
        if isinstance(message, Failed):
            _count(call.context.usage, message.spent)
            call.end(from_frame(message))
            return
        if isinstance(message, Answer):
            _count(call.context.usage, message.spent)
        call.answer(message)
        call.end()


class Stream(AsyncGenerator[bytes, None]):
    """A streamed answer; however it ends, the engine is told when nobody reads on."""

    def __init__(self, link: Link, call: Call) -> None:
        self._link = link
        self._call = call

    async def __anext__(self) -> bytes:
        call = self._call
        if call.chunks and call.context.shortcut.offer(call.chunks):
            self._link.read(call, sum(map(len, call.chunks)))
            call.chunks.clear()
        while not call.chunks:
            if call.over:
                error, call.error = call.error, None
                raise error or StopAsyncIteration
            try:
                await call.wait()
            except BaseException:
                self._link.abandon(call)
                raise
        chunk = call.chunks.popleft()
        self._link.read(call, len(chunk))
        return chunk

    async def asend(self, value: None) -> bytes:
        return await self.__anext__()

    async def athrow(self, *error: Any) -> bytes:
        await self.aclose()
        return await super().athrow(*error)

    async def aclose(self) -> None:
        """Returns once the engine has let go of the request."""
        self._link.abandon(self._call)
        self._call.chunks.clear()
        self._call.over = True
        await self._link.leave(self._call)

    def __del__(self) -> None:
        self._link.abandon(self._call)


def _count(usage: Usage, spent: Spent) -> None:
    usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.queue_s, usage.prefill_s = spent
