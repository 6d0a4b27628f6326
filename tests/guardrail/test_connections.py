"""HTTP/1.1 as servers speak it, well and badly, to what asks the predictor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from aim_guardrail.connections import CannotConnect, Connection, Connections, NotHttp

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nx-late: 1\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\nX-One: 1\r\nContent-Length: 5\r\n\r\nhello"


@contextlib.asynccontextmanager
async def serving(serve: Server, silence_s: float = 20) -> AsyncIterator[Connections]:
    """Connections to a server that does that with each of its own."""
    tasks = set[asyncio.Task[None]]()

    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(met, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connections = Connections(f"127.0.0.1:{port}", use_ssl=False, connect_timeout_s=5, silence_timeout_s=silence_s)
    async with server:
        yield connections
        connections.close()
        for task in tasks:
            task.cancel()


def answering(*answers: bytes, every: int = 2**20) -> Server:
    """Each request of a connection gets the next of these answers, in pieces of so many bytes; then it is closed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            for at in range(0, len(answer), every):
                writer.write(answer[at : at + every])
                await writer.drain()
                await asyncio.sleep(0)

    return serve


async def asked(connections: Connections, method: str = "GET", body: bytes = b"") -> tuple[Connection, bytes]:
    connection = await connections.take()
    await connection.ask(method, "/x", "h", [], body)
    return connection, await rest_of(connection)


async def rest_of(connection: Connection) -> bytes:
    pieces = []
    while piece := await connection.piece():
        pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("every", [1, 2, 7, 2**20])
@pytest.mark.parametrize("answer", [WHOLE, CHUNKED, b"HTTP/1.1 103 Early\r\nx: y\r\n\r\n" + WHOLE])
async def test_an_answer_however_it_is_cut_and_then_another(answer: bytes, every: int) -> None:
    async with serving(answering(answer, WHOLE, every=every)) as connections:
        first, body = await asked(connections)
        assert (first.status, body) == (200, b"hello")
        assert (b"x", b"y") not in first.headers
        connections.give_back(first)
        second, body = await asked(connections)
        assert (second is first, body, (b"x-one", b"1") in second.headers) == (True, b"hello", True)


async def test_a_body_that_ends_with_its_connection() -> None:
    async with serving(answering(b"HTTP/1.0 200 OK\r\n\r\nhello")) as connections:
        connection, body = await asked(connections)
        assert body == b"hello"
        connections.give_back(connection)
        assert not connection.is_open


@pytest.mark.parametrize(("method", "head"), [("HEAD", b"content-length: 5"), ("GET", b"content-length: 0")])
async def test_an_answer_without_a_body(method: str, head: bytes) -> None:
    async with serving(answering(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")) as connections:
        assert (await asked(connections, method))[1] == b""


@pytest.mark.parametrize("more", [WHOLE, b"HTTP/1.1 408 Timeout\r\nContent-Length: 0\r\n\r\n", b"\0"])
async def test_what_nobody_asked_for_is_no_answer_to_the_next(more: bytes) -> None:
    async with serving(answering(WHOLE + more, WHOLE)) as connections:
        first, body = await asked(connections)
        assert body == b"hello"
        connections.give_back(first)
        assert not first.is_open


async def test_an_answer_that_is_left_unread_is_nobody_elses() -> None:
    async with serving(answering(WHOLE, WHOLE)) as connections:
        connection = await connections.take()
        await connection.ask("GET", "/x", "h", [], b"")
        connections.give_back(connection)
        assert not connection.is_open
        assert (await asked(connections))[0] is not connection


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 200 OK\r\nbad name: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\na",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * 400_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n",
    ],
)
async def test_what_is_no_http(said: bytes) -> None:
    async with serving(answering(said)) as connections:
        with pytest.raises(NotHttp):
            await asked(connections)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200", WHOLE[:-1], CHUNKED[:-3]])
async def test_a_connection_that_breaks(said: bytes) -> None:
    async with serving(answering(said)) as connections:
        with pytest.raises(ConnectionError):
            await asked(connections)


async def test_silence() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE[:-1])
        await reader.read()

    async with serving(serve, silence_s=0.05) as connections:
        connection = await connections.take()
        await connection.ask("GET", "/x", "h", [], b"")
        assert await connection.piece() == b"hell"
        with pytest.raises(TimeoutError):
            await connection.piece()


async def test_a_server_waits_for_who_does_not_read_and_is_not_called_silent() -> None:
    written = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 16777216\r\n\r\n")
        for _ in range(16):
            writer.write(bytes(2**20))
            await writer.drain()
            written += 2**20

    async with serving(serve, silence_s=0.2) as connections:
        connection = await connections.take()
        await connection.ask("GET", "/x", "h", [], b"")
        before = -1
        while before != written:  # until it can write no more
            before = written
            await asyncio.sleep(0.3)
        assert written < 2**24
        assert len(await rest_of(connection)) == 2**24


@pytest.mark.parametrize("size", [0, 10, 5_000_000])
async def test_a_body_arrives_whole(size: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert f"Content-Length: {size}\r\n".encode() in head
        got = await reader.readexactly(size)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + (b"right" if got == bytes(size) else b"wrong"))

    async with serving(serve) as connections:
        assert (await asked(connections, "POST", bytes(size)))[1] == b"right"


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("/a b", []),
        ("/a\r\nx: y", []),
        ("", []),
        ("/a", [(b"x", b"1\r\ny: 2")]),
        ("/a", [(b"x", b"1\ny: 2")]),
        ("/a", [(b"x\r", b"1")]),
    ],
)
async def test_a_request_that_would_be_two(target: str, headers: list[tuple[bytes, bytes]]) -> None:
    async with serving(answering(WHOLE)) as connections:
        connection = await connections.take()
        with pytest.raises(ValueError, match="holds what would end it"):
            await connection.ask("GET", target, "h", headers, b"")
        connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no.such.host.invalid", f"{'a' * 70}.invalid"])
async def test_nobody_there(host: str) -> None:
    connections = Connections(host, use_ssl=False, connect_timeout_s=5, silence_timeout_s=5)
    with pytest.raises(CannotConnect):
        await connections.take()
