"""Streams from an engine's process go past the task that sends them, and nobody can tell but by the work it saves."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_kserve.shortcut import Shortcut
from aim_runtime.engines.base import RequestContext
from aim_runtime.supervisor.frames import NOTHING, Chunks, Ended, Opened, encode
from aim_runtime.supervisor.link import Link
from fake_engine import words
from served import Served

CHAT = "/v1/chat/completions"
ASK = {"model": "m", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 40, "stream": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served.fake(process=True, token_s=0.002, slots=64) as server:
        yield server


def events(text: str) -> list[Any]:
    *told, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [orjson.loads(event.removeprefix("data: ")) for event in told]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def total(server: Served, name: str) -> float:
    found = re.findall(rf"^{name}{{.*}} (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    return sum(map(float, found))


async def test_many_streams_at_once_are_whole_in_order_counted_and_timed(served: Served) -> None:
    names = ("aim_generation_tokens_total", "aim_inter_token_latency_seconds_count")
    before = [total(served, name) for name in names]
    async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
        asked = [client.post(CHAT, json=ASK | {"stream_options": {"include_usage": True}}) for _ in range(32)]
        answers = [events(answer.text) for answer in await asyncio.gather(*asked)]
    for chunks in answers:
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert text_of(chunks[:-1]) == "".join(words(40))
        assert chunks[-1]["usage"]["completion_tokens"] == 40
    assert len({chunks[0]["id"] for chunks in answers}) == 32
    assert [total(served, name) - then for name, then in zip(names, before, strict=True)] == [32 * 40, 32 * 39]


async def test_a_client_that_reads_slowly_loses_nothing_and_holds_up_nobody(served: Served) -> None:
    size, count = 50_000, 400
    body = orjson.dumps({"size": size, "count": count})
    reader, writer = await asyncio.open_connection("127.0.0.1", served.http_port, limit=2**16)
    writer.write(b"POST /v1/odd/large HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    await reader.readuntil(b"\r\n\r\n")
    async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
        for _ in range(3):
            assert text_of(events((await client.post(CHAT, json=ASK)).text)) == "".join(words(40))
    received = await reader.read(-1)
    writer.close()
    assert [int(number) for number in re.findall(rb"data: (\d{8})", received)] == list(range(count))
    assert len(received) > size * count


async def test_a_client_that_leaves_ends_its_request_in_the_engine(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
        state = (await client.post("/v1/fake/state", json={})).json()
        async with client.stream("POST", CHAT, json=ASK | {"max_tokens": 100_000}) as answer:
            lines = answer.aiter_lines()
            for _ in range(20):
                await anext(lines)
        for _ in range(200):
            now = (await client.post("/v1/fake/state", json={})).json()
            if now["running"] == 0 and len(now["aborted"]) == len(state["aborted"]) + 1:
                return
            await asyncio.sleep(0.02)
    pytest.fail(f"still computing: {now}")


async def test_a_stream_whose_engine_dies_ends_in_an_error_event(served: Served) -> None:
    (engine,) = psutil.Process(served.process.pid).children()
    async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
        asked = [asyncio.create_task(client.post(CHAT, json=ASK | {"max_tokens": 100_000})) for _ in range(3)]
        await asyncio.sleep(0.3)
        os.kill(engine.pid, signal.SIGKILL)
        for answer in await asyncio.gather(*asked):
            *chunks, error = events(answer.text)
            assert len(chunks) > 10
            assert error["error"]["code"] == "engine_restarting"
            got = text_of(chunks)
            assert got == "".join(words(len(got.split())))
    served.wait_ready()


# --- how --------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_whatever_way_chunks_go_their_order_stays(frames: list[list[int]], random: Any) -> None:
    """Frames come while the reader waits or is busy, and the client takes some at once and others not."""
    sent = [[f"{index}.{each}".encode() for each in frame] for index, frame in enumerate(frames)]
    got: list[bytes] = []
    tapped: list[bytes] = []

    def write(data: bytes) -> bool:
        if random.random() < 0.4:
            return False
        got.extend(event.removeprefix(b"data: ") for event in data.split(b"\n\n")[:-1])
        return True

    async def run() -> None:
        link, context = linked()
        context.shortcut.write, context.shortcut.tap = write, tapped.append
        asked = asyncio.ensure_future(link.ask("chat/completions", {}, context))
        await asyncio.sleep(0)
        link.data_received(bytes(encode([Opened(1, [])])))
        answer = await asked

        async def read() -> None:
            async for chunk in answer:
                got.append(chunk)
                context.shortcut.is_open = True
                for _ in range(random.randrange(3)):
                    await asyncio.sleep(0)

        reading = asyncio.ensure_future(read())
        for frame in sent:
            link.data_received(bytes(encode([Chunks(1, frame, NOTHING)])))
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
        link.data_received(bytes(encode([Ended(1)])))
        await reading

    asyncio.run(run())
    assert got == [chunk for frame in sent for chunk in frame]
    assert set(tapped) <= set(got)


async def test_a_chunk_by_the_shortcut_wakes_nobody() -> None:
    link, context = linked()
    written: list[bytes] = []
    asked = asyncio.ensure_future(link.ask("chat/completions", {}, context))
    await asyncio.sleep(0)
    link.data_received(bytes(encode([Opened(1, [])])))
    answer = await asked
    woken = 0

    async def read() -> None:
        nonlocal woken
        async for _ in answer:
            woken += 1
            context.shortcut.write, context.shortcut.is_open = (lambda data: not written.append(data)), True

    reading = asyncio.ensure_future(read())
    for number in range(100):
        await asyncio.sleep(0)
        link.data_received(bytes(encode([Chunks(1, [b"%d" % number], NOTHING)])))
    link.data_received(bytes(encode([Ended(1)])))
    await reading
    assert woken <= 2
    assert woken + len(written) == 100


async def test_it_is_shut_until_the_sender_has_had_a_chunk_and_without_a_connection() -> None:
    shortcut = Shortcut()
    assert not shortcut.offer([b"1"])
    shortcut.is_open = True
    assert not shortcut.offer([b"1"])
    shortcut.write = bool
    assert shortcut.offer([b"1"])


def linked() -> tuple[Link, RequestContext]:
    def nothing(_: Any) -> None: ...

    return Link(on_loaded=nothing, on_beat=nothing, on_lost=nothing, on_garbage=nothing), RequestContext("r")
