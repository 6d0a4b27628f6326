"""A client for benchmarks of servers: prepared requests over kept connections, as little of its own as can be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import orjson


def cpu_s(pid: int) -> float:
    """Of all threads and no children, in nanoseconds: ``/proc/PID/stat`` counts in 10 ms."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def load(
    pid: int,
    port: int,
    body: Mapping[str, Any],
    tokens: int,
    *,
    concurrency: int,
    count: int,
    heads: Sequence[str] = ("",),
) -> tuple[list[float], float, float]:
    """Ask ``count`` times for a chat of ``tokens`` tokens: seconds of each request (sorted), of all, and of the
    server's CPU. ``heads``: further header lines, of one request after another."""
    cpu_before, started = cpu_s(pid), time.perf_counter()
    times = asyncio.run(_ask_all(port, _requests(body, heads), bool(body.get("stream")), tokens, concurrency, count))
    return sorted(times), time.perf_counter() - started, cpu_s(pid) - cpu_before


def _requests(body: Mapping[str, Any], heads: Sequence[str]) -> list[bytes]:
    payload = orjson.dumps(body)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return [f"{head}{more}content-length: {len(payload)}\r\n\r\n".encode() + payload for more in heads]


async def _ask_all(
    port: int, requests: Sequence[bytes], stream: bool, tokens: int, concurrency: int, count: int
) -> list[float]:
    left = zip(range(count), cycle(requests), strict=False)
    times: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
        for _, request in left:
            started = time.perf_counter()
            writer.write(request)
            await (_streamed(reader, tokens) if stream else _whole(reader))
            times.append(time.perf_counter() - started)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return times


async def _whole(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert head.startswith(b"http/1.1 200"), head
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    assert b'"finish_reason":"length"' in await reader.readexactly(length)


async def _streamed(reader: asyncio.StreamReader, tokens: int) -> None:
    try:
        answer = await reader.readuntil(b"\r\n0\r\n\r\n")
    except asyncio.IncompleteReadError as error:  # a refusal, perhaps: the memory watch of a machine that is full
        raise SystemExit(f"no stream: {error.partial[-1000:]!r}") from None
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
    assert answer.count(b'"content":"') == tokens + 1, answer[-500:]
    assert b"data: [DONE]" in answer
