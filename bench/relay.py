"""The floor under a front: uvloop protocols that pass on what a process of theirs gives, token by token.

``relay.py PORT TOKEN_S TOKENS``: whatever is POSTed to the port is answered with so many server-sent events at that
pace. Nothing is parsed, counted, checked or logged: what is left is a socket that is read and one that is written.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from typing import cast

import uvloop

SLOT = 1  # bytes before every event: whose it is
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chatcmpl-' + b"0" * 32 + b'","object":"chat.completion.chunk","created":1700000000,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
)
CHUNK = f"{len(EVENT):x}\r\n".encode() + EVENT + b"\r\n"
LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Engine(asyncio.Protocol):
    """The other process: a byte is a slot that asks."""

    def __init__(self, token_s: float, tokens: int) -> None:
        self._token_s, self._tokens = token_s, tokens
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._loop.stop()

    def data_received(self, data: bytes) -> None:
        for slot in data:
            task = self._loop.create_task(self._answer(bytes([slot]) + EVENT))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, event: bytes) -> None:
        for index in range(self._tokens):
            await asyncio.sleep(self._token_s)
            self._transport.write(event if index else event + event)  # the role comes with the first token


class Link(asyncio.Protocol):
    """The front's end of the socket to it."""

    def __init__(self) -> None:
        self.clients: dict[int, Client] = {}
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        size = SLOT + len(EVENT)
        whole = len(data) - len(data) % size
        for at in range(0, whole, size):
            client = self.clients.get(data[at])
            if client is not None:
                client.token()
        self._rest = data[whole:]


class Client(asyncio.Protocol):
    """One kept connection; a request ends where its JSON does."""

    def __init__(self, link: Link, tokens: int) -> None:
        self._link, self._tokens = link, tokens
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._slot = next(slot for slot in range(256) if slot not in self._link.clients)
        self._link.clients[self._slot] = self

    def connection_lost(self, error: Exception | None) -> None:
        del self._link.clients[self._slot]

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"}"):
            self._left = self._tokens + 1
            self._transport.write(HEAD)
            self._link.transport.write(bytes([self._slot]))

    def token(self) -> None:
        self._left -= 1
        self._transport.write(CHUNK if self._left else CHUNK + LAST)


async def front(port: int, token_s: float, tokens: int) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, __file__, "--engine", str(theirs.fileno()), str(token_s), str(tokens)]
        subprocess.Popen(command, pass_fds=[theirs.fileno()])  # noqa: ASYNC220  once, before anything is served
    loop = asyncio.get_running_loop()
    _, link = await loop.create_unix_connection(Link, sock=ours)
    server = await loop.create_server(lambda: Client(link, tokens), "127.0.0.1", port)
    await server.serve_forever()


async def engine(descriptor: int, token_s: float, tokens: int) -> None:
    await asyncio.get_running_loop().create_unix_connection(
        lambda: Engine(token_s, tokens), sock=socket.socket(fileno=descriptor)
    )
    await asyncio.Event().wait()


if __name__ == "__main__":
    is_engine = sys.argv[1] == "--engine"
    number, token_s, tokens = sys.argv[-3:]
    uvloop.run((engine if is_engine else front)(int(number), float(token_s), int(tokens)))
