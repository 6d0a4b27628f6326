"""HTTP to one server: a request, its answer, and every failure as a ServingError. The runtime's only file that knows
aiohttp."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from aim_kserve.errors import ServingError, Unavailable
from aim_kserve.sse import Event, EventReader, EventTooLarge

from .errors import malformed

MAX_EVENT_BYTES = 4 * 2**20
#: Of a whole answer: embeddings of a large batch are the largest.
MAX_ANSWER_BYTES = 64 * 2**20
MAX_ERROR_BYTES = 2**20
_READ_BYTES = 64 * 1024
_LARGE_BYTES = 2**20  # aiohttp writes larger bytes in pieces only when they come as a file
_DRAIN_TIMEOUT_S = 0.2
#: uvicorn, under vLLM and SGLang, closes an idle connection after 5 s: one that is about to be closed is not used.
_KEEP_ALIVE_S = 4.0
_BROKEN = (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, ConnectionError)


class EngineTimeout(ServingError):
    """The server took the request and then kept silent for too long."""

    status = 504
    type = "upstream_timeout"


class Connection:
    """A bounded pool of connections to one server.

    Args:
        base_url: without ``/v1``.
        most: connections at once; further requests wait for one.
        connect_timeout_s: name look-up and TCP (and TLS) connection.
        silence_timeout_s: longest wait for the next byte of an answer.
        key_file: holds the bearer token; None sends none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        most: int,
        connect_timeout_s: float = 5,
        silence_timeout_s: float = 600,
        key_file: Path | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._most = most
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._headers = {"authorization": f"Bearer {key_file.read_text().strip()}"} if key_file else {}
        self._session: aiohttp.ClientSession | None = None
        self.closed = False

    async def close(self) -> None:
        """Every request on its way ends, and its caller is told."""
        self.closed = True
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of a probe.

        Raises:
            ServingError: no whole answer within ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._send("GET", path, b"", {})
                try:
                    return answer.status, await answer.read(MAX_ANSWER_BYTES)
                finally:
                    answer.release()
        except TimeoutError:
            raise EngineTimeout(f"{self.base_url}{path} did not answer within {timeout_s:g} s") from None

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send a JSON body; the answer's head is here, its body is not.

        It is sent a second time only where a kept connection turns out to be closed before a byte of the answer: the
        server most likely never saw it.

        Raises:
            Unavailable: no connection, or it broke before an answer began.
            EngineTimeout: connected, but no answer began in time.
        """
        return await self._send("POST", path, body, {"content-type": "application/json", **headers})

    async def _send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        try:
            try:
                return await self._request(method, path, body, headers)
            except _Stale:
                return await self._request(method, path, body, headers)
        except (aiohttp.ClientError, OSError, RuntimeError, ValueError, _Stale) as error:
            raise self.explain(error) from error

    async def _request(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        trace: dict[str, bool] = {}
        try:
            response = await self._open().request(
                method,
                self.base_url + path,
                headers={**self._headers, **headers},
                data=io.BytesIO(body) if len(body) > _LARGE_BYTES else body or None,
                allow_redirects=False,
                trace_request_ctx=trace,
            )
        except _BROKEN as error:
            if trace and not isinstance(error, aiohttp.ClientConnectorError) and not self.closed:
                raise _Stale from error
            raise
        return Answer(response, self)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            if self.closed:
                raise RuntimeError("closed")
            trace = aiohttp.TraceConfig()
            trace.on_connection_reuseconn.append(_reused)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._most, keepalive_timeout=_KEEP_ALIVE_S),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._connect_timeout_s, sock_read=self._silence_timeout_s
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("accept-encoding",),  # tokens are not compressed
                max_line_size=64 * 1024,
                max_field_size=64 * 1024,
                trace_configs=[trace],
            )
        return self._session

    def explain(self, error: BaseException) -> ServingError:
        """What a client is told of a failure of aiohttp's."""
        if self.closed:
            return Unavailable("the server shut down before the answer was complete: ask again", code="shutting_down")
        where = f"the server {self.base_url}"
        if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
            return Unavailable(f"{where} cannot be reached: ask again", code="engine_unreachable")
        if isinstance(error, TimeoutError):
            return EngineTimeout(f"{where} kept silent for {self._silence_timeout_s:g} s", code="engine_timeout")
        if isinstance(error, (*_BROKEN, aiohttp.ClientPayloadError, _Stale)):
            return Unavailable(f"{where} closed the connection before its answer was complete", code="engine_broke_off")
        return malformed(f"it is not HTTP ({type(error).__name__})")


class _Stale(Exception):
    """A kept connection was closed before a byte of the answer."""


async def _reused(_: aiohttp.ClientSession, context: Any, __: Any) -> None:
    context.trace_request_ctx["reused"] = True


class Answer:
    """Head of an answer; its body is read once, whole or as events. ``release`` it: what has not been read to its end
    closes the connection, which is how the server learns that nobody waits any more."""

    def __init__(self, response: aiohttp.ClientResponse, connection: Connection) -> None:
        self._response = response
        self._connection = connection
        self._events = EventReader(MAX_EVENT_BYTES)
        self.status = response.status
        self.content_type = response.content_type
        self.retry_after = response.headers.get("retry-after")
        self._closed = _end_of(response)
        if self._closed is not None:
            self._closed.add_done_callback(self._connection_is_gone)

    async def read(self, most_bytes: int = MAX_ANSWER_BYTES) -> bytes:
        """The whole body.

        Raises:
            UpstreamFailed: larger than ``most_bytes``, or not what its head says.
            Unavailable, EngineTimeout: the connection broke, or nothing came for too long.
        """
        parts, size = [], 0
        while part := await self._part():
            parts.append(part)
            size += len(part)
            if size > most_bytes:
                raise malformed(f"it is larger than {most_bytes} bytes")
        return b"".join(parts)

    async def next_events(self) -> list[Event] | None:
        """Its next server-sent events, perhaps none of them complete yet; None at its end. Raises as :meth:`read`; an
        event larger than MAX_EVENT_BYTES is malformed."""
        part = await self._part()
        try:
            return self._events.feed(part) if part else None
        except EventTooLarge as error:
            raise malformed(str(error)) from None

    async def _part(self) -> bytes:
        try:
            return await self._response.content.read(_READ_BYTES)
        except (aiohttp.ClientError, OSError, RuntimeError, ValueError) as error:
            raise self._connection.explain(error) from error

    async def finish(self) -> None:
        """After the last event: the connection is kept if the server ends its answer at once."""
        try:
            async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                while await self._response.content.read(_READ_BYTES):
                    pass
        except (aiohttp.ClientError, OSError):  # TimeoutError is an OSError
            return

    def release(self) -> None:
        """Give the connection back if everything has been read; otherwise close it."""
        if self._closed is not None:
            self._closed.remove_done_callback(self._connection_is_gone)
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()

    def _connection_is_gone(self, closed: asyncio.Future[None]) -> None:
        """aiohttp (3.14) leaves who reads a body waiting for ever when it has closed a connection on bytes that are
        no HTTP."""
        closed.exception()  # seen
        body = self._response.content
        if not body.is_eof() and body.exception() is None:
            body.set_exception(aiohttp.ClientPayloadError("the connection was closed within the answer"))


def _end_of(response: aiohttp.ClientResponse) -> asyncio.Future[None] | None:
    """Done when the answer's connection is closed; None once it has been given back: the answer is complete."""
    connection = response.connection
    return connection.protocol.closed if connection is not None and connection.protocol is not None else None
