"""Bodies, server-sent events, and clients that leave, on bare ASGI."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from aim_kserve.errors import BadRequest, TooLarge, Unavailable
from aim_kserve.http import (
    MAX_COMMAS,
    ClientDisconnected,
    cancelled_on_disconnect,
    parse_object,
    read_body,
    send_error,
    send_events,
    until_disconnected,
)
from aim_kserve.shortcut import EXTENSION, Leaving
from aim_kserve.sse import sse


class Client:
    """The other end of an ASGI connection: sends ``chunks``, then stays until ``leave`` is called."""

    def __init__(self, *chunks: bytes, leaves_early: bool = False) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        for index, chunk in enumerate(chunks):
            more = leaves_early or index + 1 < len(chunks)
            self._messages.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        if leaves_early:
            self.leave()
        self.got: list[Message] = []

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Message:
        return await self._messages.get()

    async def send(self, message: Message) -> None:
        self.got.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.got)


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=8))
def test_a_body_in_any_pieces(chunks: list[bytes]) -> None:
    assert asyncio.run(read_body(Client(*chunks).receive, 200)) == b"".join(chunks)


def test_more_values_than_any_model_reads_are_refused_unparsed() -> None:
    few = b'{"prompt":[' + b"1," * 10_000 + b"1]}"
    assert len(parse_object(few)["prompt"]) == 10_001
    with pytest.raises(BadRequest, match="2097153 commas"):
        parse_object(b'{"prompt":[' + b"[]," * (MAX_COMMAS + 1) + b"not even JSON")


async def test_bodies_too_large_or_never_finished() -> None:
    for chunks in ([b"x" * 11], [b"x" * 6, b"x" * 6]):
        with pytest.raises(TooLarge, match="10 bytes"):
            await read_body(Client(*chunks).receive, 10)
    with pytest.raises(ClientDisconnected):
        await read_body(Client(b"x", leaves_early=True).receive, 10)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"null", b"\xff", b'{"a": NaN}'])
def test_what_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_object(body)
    assert caught.value.code == "invalid_json"


def test_events_are_framed() -> None:
    assert sse(b"{}") == b"data: {}\n\n"
    assert sse(b"event: done\ndata: {}") == b"event: done\ndata: {}\n\n"


async def test_errors_carry_retry_after() -> None:
    client = Client()
    await send_error(client.send, Unavailable("later", retry_after_s=1.2))
    assert client.got[0]["status"] == 503
    assert (b"retry-after", b"2") in client.got[0]["headers"]
    assert orjson.loads(client.body)["error"]["message"] == "later"


class Events:
    """A generator of events that knows whether it was closed."""

    def __init__(self, *payloads: bytes, error: Exception | None = None, endless: bool = False) -> None:
        self.closed = False
        self.stream = self._generate(payloads, error, endless)

    async def _generate(self, payloads: Any, error: Exception | None, endless: bool) -> AsyncGenerator[bytes, None]:
        try:
            for payload in payloads:
                yield payload
            if error:
                raise error
            while endless:
                await asyncio.sleep(0.001)
                yield b"more"
        finally:
            self.closed = True


async def test_a_stream_ends_in_done() -> None:
    client, events = Client(), Events(b"1", b"2")
    await send_events(client.send, client.receive, events.stream)
    assert client.body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert (client.got[0]["status"], client.got[-1].get("more_body", False)) == (200, False)
    assert events.closed


async def test_a_stream_that_fails_ends_in_an_error_event_and_done() -> None:
    client, events = Client(), Events(b"1", error=Unavailable("gone", code="dead"))
    await send_events(client.send, client.receive, events.stream)
    first, error, done, end = client.body.split(b"\n\n")
    assert (first, done, end) == (b"data: 1", b"data: [DONE]", b"")
    assert orjson.loads(error.removeprefix(b"data: "))["error"]["code"] == "dead"
    assert events.closed


async def test_a_stream_is_closed_when_its_client_leaves() -> None:
    client, events = Client(), Events(endless=True)
    asyncio.get_running_loop().call_later(0.02, client.leave)
    with pytest.raises(ClientDisconnected):
        await asyncio.wait_for(send_events(client.send, client.receive, events.stream), 5)
    assert events.closed
    assert b"[DONE]" not in client.body


async def test_work_is_cancelled_when_its_client_leaves() -> None:
    client, ended = Client(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    asyncio.get_running_loop().call_later(0.02, client.leave)
    with pytest.raises(ClientDisconnected):
        await until_disconnected(client.receive, asyncio.ensure_future(work()))
    assert ended.is_set()


async def test_work_that_ends_first_is_answered() -> None:
    client = Client()

    async def work() -> int:
        return 7

    assert await until_disconnected(client.receive, asyncio.ensure_future(work())) == 7
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1  # nobody watches the connection any more


async def test_leaving_is_noticed_even_where_the_body_swallows_it() -> None:
    """vLLM answers a cancelled request instead of letting go."""
    client = Client()
    client.leave()

    async def swallow() -> None:
        async with cancelled_on_disconnect(client.receive):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    with pytest.raises(ClientDisconnected):
        await swallow()
    await asyncio.sleep(0)  # and the task is not cancelled a second time


async def test_a_server_that_tells_who_leaves_need_not_be_asked() -> None:
    client, leaving = Client(), Leaving()
    scope = {"extensions": {EXTENSION: {"leaving": leaving}}}

    async def work(seconds: float) -> int:
        async with cancelled_on_disconnect(client.receive, scope):
            await asyncio.sleep(seconds)
        return len(asyncio.all_tasks())

    assert await work(0) == 1  # nobody watches
    assert leaving.tell is None
    task = asyncio.create_task(work(60))
    await asyncio.sleep(0.01)
    leaving.left()
    with pytest.raises(ClientDisconnected):
        await task
    client.leave()
    with pytest.raises(ClientDisconnected):  # it had left before
        await work(60)


async def test_somebody_elses_cancellation_stays_one() -> None:
    client = Client()

    async def work() -> None:
        async with cancelled_on_disconnect(client.receive):
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_of_the_body_wins_over_leaving() -> None:
    client = Client()

    async def fail() -> None:
        async with cancelled_on_disconnect(client.receive):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
