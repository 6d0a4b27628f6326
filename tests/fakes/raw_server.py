"""An OpenAI server that answers whatever bytes a test says, and remembers what it was sent.

``async with RawServer() as server``: ``/health`` and ``/v1/models`` are answered as they should be, everything else by
``server.behave``, a coroutine that gets the writer. No HTTP library stands between: half an answer is half an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import orjson

from listening import stop_accepting

Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]


def http(body: bytes | dict[str, Any], status: int = 200, kind: str = "application/json", **headers: str) -> bytes:
    """A whole answer."""
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status} Said\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n{more}\r\n"
    return head.encode() + content


SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def part(data: bytes) -> bytes:
    """Of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


END = b"0\r\n\r\n"


def says(*writes: bytes) -> Behaviour:
    async def behave(writer: asyncio.StreamWriter) -> None:
        for data in writes:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0)

    return behave


def then_resets(*writes: bytes) -> Behaviour:
    """RST instead of FIN: what a killed process' kernel sends to whoever has unread data on the way."""

    async def behave(writer: asyncio.StreamWriter) -> None:
        await says(*writes)(writer)
        await asyncio.sleep(0.02)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    return behave


def then_closes(*writes: bytes) -> Behaviour:
    async def behave(writer: asyncio.StreamWriter) -> None:
        await says(*writes)(writer)
        writer.close()

    return behave


@dataclass
class Asked:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class RawServer:
    models: tuple[str, ...] = ("theirs",)
    extra: dict[str, bytes] = field(default_factory=dict)  # path → whole answer to a GET
    behave: Behaviour = field(default_factory=lambda: says(http({})))
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    closed_by_client: int = 0
    port: int = 0  # any

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._tasks: set[asyncio.Task[None]] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        await stop_accepting(*(listening.fileno() for listening in self._server.sockets))
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            self.closed_by_client += 1
            return False
        line, *rest = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (item.partition(": ") for item in rest)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        verb, path, _ = line.split(" ")
        if verb == "GET":
            writer.write(self._get(path))
            return True
        self.asked.append(Asked(path, headers, orjson.loads(body)))
        behaving = asyncio.ensure_future(self.behave(writer))
        leaving = asyncio.ensure_future(reader.read(1))
        await asyncio.wait([behaving, leaving], return_when=asyncio.FIRST_COMPLETED)
        if leaving.done() and not behaving.done():
            self.closed_by_client += 1
        leaving.cancel()
        behaving.cancel() if not behaving.done() else behaving.result()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving
        return not writer.is_closing()

    def _get(self, path: str) -> bytes:
        cards = [{"id": name, "object": "model", "max_model_len": 4096} for name in self.models]
        known = {"/health": http(b""), "/v1/models": http({"object": "list", "data": cards}), **self.extra}
        return known.get(path, http({"detail": "Not Found"}, 404))
