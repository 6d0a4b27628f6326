"""HTTP/1.1 to one server over connections that are kept: what `upstream` asks on.

On httptools, as uvicorn is. aiohttp's client, which can do far more, takes five times the CPU for a request, and that
was a quarter of what the whole hop took (``bench/hop.py``).
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections import deque
from collections.abc import Iterable
from typing import cast
from urllib.parse import urlsplit

import httptools
from aiohappyeyeballs import start_connection

Headers = Iterable[tuple[bytes, bytes]]

_KEPT_S = 15.0  # a connection that nobody uses: most servers keep one for longer
_EYEBALLS_S = 0.25  # RFC 8305: until the next address of a name is tried beside the first
_MOST_HEAD_BYTES = 256 * 1024
_MOST_UNREAD_BYTES = 256 * 1024  # of a body; then the server waits
_SHORT_BYTES = 64 * 1024  # sent together with its head
_WITHOUT_BODY = frozenset(["GET", "HEAD", "OPTIONS", "TRACE"])
_FRAMING = frozenset([b"content-length", b"transfer-encoding"])
_TARGET = re.compile(r"[^\s\x00-\x1f\x7f]+")


class CannotConnect(Exception):
    """Nobody answers there, or not in time, or it is not who it should be."""


class NotHttp(Exception):
    """What a server said is no answer."""


class Connection(asyncio.Protocol):
    """One connection and, between :meth:`ask` and :meth:`close` or being kept, one answer.

    Attributes:
        status: of the answer.
        headers: of the answer, names in lower case.
        is_complete: all of the answer has come; what of its body has not been taken is kept.
    """

    def __init__(self, silence_timeout_s: float) -> None:
        self.is_complete = True
        self._silence_timeout_s = silence_timeout_s
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._keeps = True
        self._begin("")

    def _begin(self, method: str) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._method = method
        self._head_bytes = 0
        self._pieces: list[bytes] = []
        self._unread_bytes = 0
        self._is_paused = False

    # --- for who asks ---------------------------------------------------------------------------------------------

    async def ask(self, method: str, target: str, host: str, headers: Headers, body: bytes) -> None:
        """Send a request; return when the head of its answer has come. ``headers``: all but of host and framing.

        Raises:
            ValueError: a header or the target would not end where it does.
            NotHttp: what came is no answer.
            OSError: the connection broke, or (TimeoutError) nothing came for too long.
        """
        head = _head(method, target, host, headers, body)
        self._begin(method)
        self.is_complete = False
        self._heard_s = self._loop.time()
        self._timer = self._loop.call_later(self._silence_timeout_s, self._listen)
        if len(body) <= _SHORT_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        while not self.status:
            await self._more()

    async def piece(self) -> bytes:
        """What has come of the body since the last piece, nothing at its end. Raises as :meth:`ask`."""
        while not self._pieces and not self.is_complete:
            await self._more()
        taken = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self._unread_bytes = [], 0
        if self._is_paused:
            self._is_paused, self._heard_s = False, self._loop.time()
            self._transport.resume_reading()
        return taken

    @property
    def is_open(self) -> bool:
        """Whether its other end is there, as far as is known."""
        return not self._transport.is_closing()

    @property
    def can_be_kept(self) -> bool:
        """Whether another may ask on it: its answer has been taken to its end, and the server says so."""
        return self.is_complete and self._keeps and self.is_open and not self._pieces

    def rest(self) -> None:
        """Nobody waits for an answer."""
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        """At once, whatever is on its way."""
        self.rest()
        self._transport.abort()

    async def _more(self) -> None:
        """Wait for what comes next: it may be all that was waited for, and a failure behind it."""
        if self._failure is not None:
            raise self._failure
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _listen(self) -> None:
        """Nothing may have come for too long; a server that waits for us is not silent."""
        now_s = self._loop.time()
        left_s = self._silence_timeout_s - (0 if self._is_paused else now_s - self._heard_s)
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._listen)
        else:
            self._fail(TimeoutError("nothing came"))

    def _fail(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self.close()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- for the event loop ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(NotHttp(str(error)))
            return
        if not self.status:
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD_BYTES:
                self._fail(NotHttp(f"a head of more than {_MOST_HEAD_BYTES} bytes"))
        elif self._unread_bytes > _MOST_UNREAD_BYTES and not self._is_paused and not self.is_complete:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.rest()
        if error is None and self.status and _FRAMING.isdisjoint(name for name, _ in self.headers):
            self.is_complete = True  # its end is the connection's
        else:
            self._failure = self._failure or error or ConnectionResetError("the connection was closed")
        self._wake()

    # --- for the parser -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.is_complete:  # it must not be taken for the answer to whoever asks next
            raise NotHttp("an answer to nothing")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue, 103 Early Hints: the answer follows
            self.headers.clear()
            return
        self.status = status
        if self._method == "HEAD":  # the parser waits for a body that never comes
            self.is_complete, self._keeps = True, False

    def on_body(self, data: bytes) -> None:
        if not self.is_complete:
            self._pieces.append(data)
            self._unread_bytes += len(data)

    def on_message_complete(self) -> None:
        if self.status:
            self.is_complete, self._keeps = True, self._keeps and self._parser.should_keep_alive()


class Connections:
    """The connections to one server.

    Args:
        host: HOST[:PORT].
        connect_timeout_s: name look-up and TCP (and TLS) connection together.
        silence_timeout_s: the longest wait for the next byte of an answer.
    """

    def __init__(self, host: str, *, use_ssl: bool, connect_timeout_s: float, silence_timeout_s: float) -> None:
        parts = urlsplit(f"//{host}")
        self._host, self._port = parts.hostname or "", parts.port or (443 if use_ssl else 80)
        self._tls = ssl.create_default_context() if use_ssl else None
        if self._tls is not None:
            self._tls.set_alpn_protocols(["http/1.1"])
        self._connect_timeout_s, self._silence_timeout_s = connect_timeout_s, silence_timeout_s
        self._idle: deque[tuple[float, Connection]] = deque()  # since when; the one used last is the last

    async def take(self) -> Connection:
        """A connection that is nobody's, a new one where there is none. Raises CannotConnect."""
        oldest_s = asyncio.get_running_loop().time() - _KEPT_S
        while self._idle and self._idle[0][0] < oldest_s:
            self._idle.popleft()[1].close()
        while self._idle:
            connection = self._idle.pop()[1]
            if connection.is_open:
                return connection
        return await self._connect()

    def give_back(self, connection: Connection) -> None:
        """Whoever had it needs it no more: it is kept, or closed where its answer has not been read to its end."""
        if connection.can_be_kept:
            connection.rest()
            self._idle.append((asyncio.get_running_loop().time(), connection))
        else:
            connection.close()

    def close(self) -> None:
        """Close those that are kept."""
        while self._idle:
            self._idle.pop()[1].close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                sock = await start_connection(found, happy_eyeballs_delay=_EYEBALLS_S, interleave=1)
                name = self._host if self._tls else None
                _, connection = await loop.create_connection(
                    lambda: Connection(self._silence_timeout_s), sock=sock, ssl=self._tls, server_hostname=name
                )
                return connection
        except (OSError, UnicodeError) as error:  # a timeout, too; a name that is none
            raise CannotConnect(str(error)) from error


def _head(method: str, target: str, host: str, headers: Headers, body: bytes) -> bytes:
    lines = [f"{method} {target} HTTP/1.1\r\nHost: {host}".encode(), *(b"%b: %b" % item for item in headers)]
    if body or method not in _WITHOUT_BODY:
        lines.append(b"Content-Length: %d" % len(body))
    head = b"\r\n".join([*lines, b"\r\n"])
    if _TARGET.fullmatch(target) is None or head.count(b"\n") != len(lines) + 2 or head.count(b"\r") != len(lines) + 2:
        raise ValueError("a request's target or one of its headers holds what would end it")
    return head
