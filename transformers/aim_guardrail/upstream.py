"""The predictor over HTTP: requests sent on, answers brought back, connections always given back or closed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self

from aim_guardrail.connections import CannotConnect, Connection, Connections, NotHttp
from aim_guardrail.credentials import Credentials, Hidden
from aim_guardrail.metrics import Metrics
from aim_kserve.errors import ServingError, Unavailable, UpstreamFailed
from aim_kserve.http import header

Headers = Sequence[tuple[bytes, bytes]]

#: https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1, and what belongs to one hop's connection or framing.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer trailers"
    b" transfer-encoding upgrade content-length".split()
)
_REQUEST_ONLY = frozenset([b"host", b"expect"])
_RESPONSE_ONLY = frozenset([b"date"])  # our own server dates its answers
#: Never as it came: of this hop alone.
NOT_SENT_ON = _HOP_BY_HOP | _REQUEST_ONLY
_NOT_BROUGHT_BACK = _HOP_BY_HOP | _RESPONSE_ONLY

_DRAIN_TIMEOUT_S = 0.2


class UpstreamTimeout(ServingError):
    """The predictor accepted the request and then kept silent for too long."""

    status = 504
    type = "upstream_timeout"


class PredictorSaid(ServingError):
    """The predictor's own refusal, with its status."""

    type = "upstream_error"


class Upstream:
    """One predictor; ``close`` it in the end.

    Args:
        host: HOST[:PORT].
        connect_timeout_s: name look-up and TCP (and TLS) connection together.
        silence_timeout_s: longest wait for the next byte of an answer.
        retries: further tries to connect.
        credentials: whose the predictor gets.
    """

    def __init__(
        self,
        host: str,
        metrics: Metrics,
        *,
        use_ssl: bool = False,
        connect_timeout_s: float = 1.5,
        silence_timeout_s: float = 600,
        retries: int = 0,
        credentials: Credentials | None = None,
    ) -> None:
        self.host = host
        self._metrics = metrics
        self._silence_timeout_s = silence_timeout_s
        self._retries = retries
        self._credentials = credentials or Credentials()
        self._connections = Connections(
            host, use_ssl=use_ssl, connect_timeout_s=connect_timeout_s, silence_timeout_s=silence_timeout_s
        )

    def close(self) -> None:
        """Close the connections that nobody uses."""
        self._connections.close()

    async def send(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        """Send one request; ``target`` is path and query, ``headers`` are already :func:`sent_on`.

        Raises:
            Unavailable: no connection (503), or it broke before an answer began.
            UpstreamTimeout: connected, but no answer began in time (504).
        """
        headers, hidden = self._credentials.sent(headers), self._credentials.hidden()
        connecting, stale = self._retries, 1
        while True:
            self._metrics.connection_taken(1)
            try:
                connection = await self._ask(method, target, headers, body)
                return Answer(connection, self._connections, self._metrics, hidden)
            except BaseException as error:
                self._metrics.connection_taken(-1)
                if isinstance(error, CannotConnect) and connecting:
                    connecting -= 1
                elif isinstance(error, OSError) and not isinstance(error, TimeoutError) and stale:
                    stale = 0  # most likely a kept connection whose other end is gone: a fresh one tells
                else:
                    raise self._explain(error) from error

    async def _ask(self, method: str, target: str, headers: Headers, body: bytes) -> Connection:
        connection = await self._connections.take()
        try:
            await connection.ask(method, target, self.host, headers, body)
        except BaseException:  # a cancelled task, too: half an answer is on it, so nobody else may have it
            connection.close()
            raise
        return connection

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, CannotConnect):
            self._metrics.upstream_failed("connect")
            return Unavailable(f"the predictor {self.host} cannot be reached: ask again", code="predictor_unreachable")
        if isinstance(error, TimeoutError):
            self._metrics.upstream_failed("timeout")
            return UpstreamTimeout(
                f"the predictor {self.host} did not answer within {self._silence_timeout_s:g} s",
                code="predictor_timeout",
            )
        if isinstance(error, OSError):
            self._metrics.upstream_failed("broken")
            return Unavailable(
                f"the predictor {self.host} closed the connection instead of answering: ask again",
                code="predictor_broken",
            )
        if isinstance(error, NotHttp):
            self._metrics.upstream_failed("invalid")
            return UpstreamFailed(f"the predictor {self.host} answered what is not HTTP", code="predictor_invalid")
        return error


class Answer:
    """The predictor's answer: ``async with`` it, so that its connection is given back, or closed when not at its end.

    Attributes:
        status: HTTP status.
        headers: names in lower case, those of the connection and its framing left out.
        length: bytes of the body, where the predictor has said so.
        heard: is told each chunk of :meth:`chunks`, where it is set.
    """

    __slots__ = ("_connection", "_connections", "_hidden", "_metrics", "headers", "heard", "length", "status")

    def __init__(self, connection: Connection, connections: Connections, metrics: Metrics, hidden: Hidden) -> None:
        self._connection, self._connections = connection, connections
        self._metrics = metrics
        self._hidden = hidden
        self.heard: Callable[[bytes], None] | None = None
        self.status = connection.status
        self.headers = hidden.headers(brought_back(connection.headers))
        length = header(connection.headers, b"content-length")
        self.length = int(length) if length else None

    def header(self, name: bytes) -> bytes:
        """The first header of that name, or nothing."""
        return header(self.headers, name)

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            UpstreamFailed: the predictor broke off (502).
            UpstreamTimeout: it fell silent.
        """
        pieces = list[bytes]()
        try:
            while piece := await self._connection.piece():
                pieces.append(piece)
        except (NotHttp, OSError) as error:
            raise self._explain(error) from error
        return self._hidden.all(b"".join(pieces))

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises as :meth:`read`."""
        try:
            while chunk := await self._connection.piece():
                if shown := self._hidden.more(chunk):
                    yield self._told(shown)
            if rest := self._hidden.rest():
                yield self._told(rest)
        except (NotHttp, OSError) as error:
            raise self._explain(error) from error

    def _told(self, chunk: bytes) -> bytes:
        if self.heard is not None:
            self.heard(chunk)
        return chunk

    async def drain(self) -> None:
        """Read what little follows an answer's last event, so that its connection can be kept."""
        with contextlib.suppress(NotHttp, OSError):
            async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                await self._connection.piece()

    def _explain(self, error: BaseException) -> ServingError:
        if isinstance(error, TimeoutError):
            self._metrics.upstream_failed("timeout")
            return UpstreamTimeout("the predictor fell silent in the middle of its answer", code="predictor_timeout")
        self._metrics.upstream_failed("broken")
        return UpstreamFailed("the predictor broke off in the middle of its answer", code="predictor_broken")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._connections.give_back(self._connection)
        else:
            self._connection.close()
        self._metrics.connection_taken(-1)


def sent_on(headers: Headers, own: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """A client's request headers as the predictor gets them; ``own`` (names in lower case) replace the client's."""
    ours = {name.encode(): value.encode("latin-1") for name, value in own.items()}
    dropped = _named_by_connection(headers).union(ours)
    return [item for item in headers if item[0] not in NOT_SENT_ON and item[0] not in dropped] + [*ours.items()]


def brought_back(headers: Headers) -> list[tuple[bytes, bytes]]:
    """A predictor's response headers (names in lower case) as the client gets them."""
    dropped = _named_by_connection(headers)
    return [item for item in headers if item[0] not in _NOT_BROUGHT_BACK and item[0] not in dropped]


def _named_by_connection(headers: Headers) -> set[bytes]:
    named: set[bytes] = set()
    for key, value in headers:
        if key == b"connection":
            named.update(name.strip().lower() for name in value.split(b","))
    return named
