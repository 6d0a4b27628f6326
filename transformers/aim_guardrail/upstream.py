"""The predictor over HTTP: requests sent on, answers brought back, connections always given back or closed.

The only file that knows aiohttp, but for `detectors/remote.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

import aiohttp
from multidict import CIMultiDict
from yarl import URL

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
_LARGE_BYTES = 2**20  # aiohttp writes larger bytes in pieces only when they come as a file


class UpstreamTimeout(ServingError):
    """The predictor accepted the request and then kept silent for too long."""

    status = 504
    type = "upstream_timeout"


class PredictorSaid(ServingError):
    """The predictor's own refusal, with its status."""

    type = "upstream_error"


class Upstream:
    """One predictor. ``start`` before the first ``send``, ``close`` after the last.

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
        self._base = f"{'https' if use_ssl else 'http'}://{host}"
        self._metrics = metrics
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._retries = retries
        self._credentials = credentials or Credentials()
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=5),
            timeout=aiohttp.ClientTimeout(connect=self._connect_timeout_s, sock_read=self._silence_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),  # one client's cookies are not another's
            skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
            auto_decompress=False,
            max_line_size=65536,
            max_field_size=65536,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

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
                return Answer(await self._request(method, target, headers, body), self._metrics, hidden)
            except BaseException as error:
                self._metrics.connection_taken(-1)
                if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError) and connecting:
                    connecting -= 1
                elif isinstance(error, _BROKEN) and not isinstance(error, aiohttp.ClientConnectorError) and stale:
                    stale = 0  # most likely a kept connection whose other end is gone: a fresh one tells
                else:
                    raise self._explain(error) from error

    async def _request(self, method: str, target: str, headers: Headers, body: bytes) -> aiohttp.ClientResponse:
        assert self._session is not None
        data: object = io.BytesIO(body) if len(body) > _LARGE_BYTES else body or None
        return await self._session.request(
            method,
            URL(self._base + target, encoded=True),
            headers=CIMultiDict([(key.decode("latin-1"), value.decode("latin-1")) for key, value in headers]),
            data=data,
            allow_redirects=False,
        )

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.InvalidURL):
            self._metrics.upstream_failed("connect")
            return Unavailable(f"the predictor {self.host} cannot be reached: ask again", code="predictor_unreachable")
        if isinstance(error, TimeoutError):
            self._metrics.upstream_failed("timeout")
            return UpstreamTimeout(
                f"the predictor {self.host} did not answer within {self._silence_timeout_s:g} s",
                code="predictor_timeout",
            )
        if isinstance(error, _BROKEN):
            self._metrics.upstream_failed("broken")
            return Unavailable(
                f"the predictor {self.host} closed the connection instead of answering: ask again",
                code="predictor_broken",
            )
        if isinstance(error, aiohttp.ClientError):
            self._metrics.upstream_failed("invalid")
            return UpstreamFailed(f"the predictor {self.host} answered what is not HTTP", code="predictor_invalid")
        return error


_BROKEN = (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, ConnectionError)


class Answer:
    """The predictor's answer: ``async with`` it, so that its connection is given back, or closed when not at its end.

    Attributes:
        status: HTTP status.
        headers: names in lower case, those of the connection and its framing left out.
        heard: is told each chunk of :meth:`chunks`, where it is set.
    """

    __slots__ = ("_hidden", "_metrics", "_response", "headers", "heard", "status")

    def __init__(self, response: aiohttp.ClientResponse, metrics: Metrics, hidden: Hidden) -> None:
        self._response = response
        self._metrics = metrics
        self._hidden = hidden
        self.heard: Callable[[bytes], None] | None = None
        self.status = response.status
        self.headers = [(name, hidden.all(value)) for name, value in brought_back(response.raw_headers)]

    def header(self, name: bytes) -> bytes:
        """The first header of that name, or nothing."""
        return header(self.headers, name)

    @property
    def length(self) -> int | None:
        """Bytes of the body, where the predictor has said so."""
        return self._response.content_length

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            UpstreamFailed: the predictor broke off (502).
            UpstreamTimeout: it fell silent.
        """
        try:
            return self._hidden.all(await self._response.read())
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise self._explain(error) from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises as :meth:`read`."""
        try:
            async for chunk in self._response.content.iter_any():
                if shown := self._hidden.more(chunk):
                    yield self._told(shown)
            if rest := self._hidden.rest():
                yield self._told(rest)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise self._explain(error) from error

    def _told(self, chunk: bytes) -> bytes:
        if self.heard is not None:
            self.heard(chunk)
        return chunk

    async def drain(self) -> None:
        """Read what little follows an answer's last event, so that its connection can be kept."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError, TimeoutError):
            async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                await self._response.content.readany()

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
        # release() keeps a connection whose answer has been read to its end, close() is for all others.
        if self._response.content.at_eof() and kind is None:
            self._response.release()
        else:
            self._response.close()
        self._metrics.connection_taken(-1)


def sent_on(headers: Iterable[tuple[bytes, bytes]], own: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """A client's request headers as the predictor gets them; ``own`` (names in lower case) replace the client's."""
    ours = {name.encode(): value.encode("latin-1") for name, value in own.items()}
    dropped = NOT_SENT_ON | ours.keys() | _named_by_connection(headers)
    return [*(item for item in headers if item[0] not in dropped), *ours.items()]


def brought_back(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A predictor's response headers as the client gets them, names in lower case."""
    lowered = [(key.lower(), value) for key, value in headers]
    dropped = _NOT_BROUGHT_BACK | _named_by_connection(lowered)
    return [item for item in lowered if item[0] not in dropped]


def _named_by_connection(headers: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    named: set[bytes] = set()
    for key, value in headers:
        if key == b"connection":
            named.update(name.strip().lower() for name in value.split(b","))
    return named
