"""One server that judges, asked over HTTP: JSON out, JSON in, within a deadline and within bounds.

A task that is cancelled closes its connection at once. Nothing is followed to elsewhere, no proxy is taken from the
environment, and no error repeats a key or a text.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from aim_guardrail.detectors.base import Misconfigured, Unjudged
from aim_guardrail.detectors.endpoint import Endpoint
from aim_kserve.identity.key_file import KeyFile

CONNECT_TIMEOUT_S = 5.0
MOST_BYTES = 2**20
"""An answer's size. A judge's is a few hundred bytes; orjson reads as much as this in a few milliseconds."""

#: Statuses that any text would get: of the address, the model or the key.
_MISCONFIGURED = {
    401: "it refuses the key: give a valid one (api_key_file)",
    402: "it wants payment: see to the account of the key",
    403: "the key may not use it: give one that may (api_key_file)",
    404: "it knows no such route or model: check endpoint (a base URL, mostly ending in /v1) and model",
    405: "it takes no POST there: check endpoint",
    501: "it does not serve that route: check endpoint and api",
}
_REFUSED = frozenset([400, 413, 422])  # of this text: no sign that others would fare alike
_BROKEN = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError)


class RemoteFailed(Exception):
    """The server gave no answer that can be used. One line; never with the text, the key or what the server wrote."""


class RemoteRefused(RemoteFailed, Unjudged):
    """The server takes no such request: too long for its model, mostly. It says nothing of the next one."""


class Remote:
    """A server's base URL. Connections are kept and shared by all calls; ``close`` when done.

    Raises:
        ValueError: the file of its key or of its certificates cannot be used; never with what it holds.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._base = endpoint.endpoint
        self._key = None if endpoint.api_key_file is None else _key_in(endpoint.api_key_file)
        self._tls = _tls(endpoint.ca_file)
        self._session: aiohttp.ClientSession | None = None

    async def post(self, path: str, body: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """What the server answers to ``body``, a JSON object; ``deadline_s`` is a time of ``time.monotonic``.

        Raises:
            TimeoutError: no whole answer by then.
            Misconfigured: a status that any text would get, a redirect, a certificate that does not hold.
            RemoteRefused: 400, 413, 422.
            RemoteFailed: any other status, no connection, or an answer that is no JSON object or too large.
        """
        data = orjson.dumps(body)
        async with asyncio.timeout(deadline_s - time.monotonic()):
            try:
                return await self._asked(path, data)
            except _BROKEN as error:
                if isinstance(error, aiohttp.ClientConnectorError):
                    raise self._unreachable(error) from error
            try:  # most likely a kept connection whose other end is gone: a fresh one tells
                return await self._asked(path, data)
            except _BROKEN as error:
                raise self._unreachable(error) from error

    async def close(self) -> None:
        """Close all connections."""
        if self._key is not None:
            self._key.close()
        if self._session is not None:
            await self._session.close()

    async def _asked(self, path: str, data: bytes) -> dict[str, Any]:
        url = self._base + path
        headers = {"content-type": "application/json", "accept": "application/json", "accept-encoding": "identity"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key.key.decode('ascii')}"
        try:
            async with self._connected().post(url, data=data, headers=headers, allow_redirects=False) as response:
                _check(response.status, url)
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise RemoteFailed(f"{url} answered compressed, which it was asked not to")
                return _read(await _bounded(response.content, url), url)
        except _BROKEN:
            raise
        except aiohttp.ClientError as error:
            raise RemoteFailed(f"{url} answered what is not HTTP ({type(error).__name__})") from error

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=5, ssl=self._tls),
                timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._session

    def _unreachable(self, error: BaseException) -> Exception:
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return Misconfigured(
                f"{self._base}: its certificate does not hold: renew it, or give its authority (ca_file)"
            )
        if isinstance(error, aiohttp.ClientConnectorSSLError):
            return Misconfigured(f"{self._base}: it speaks no TLS that we do: check the scheme of endpoint")
        if isinstance(error, aiohttp.ClientConnectorError):
            return RemoteFailed(f"{self._base} cannot be reached")
        return RemoteFailed(f"{self._base} closed the connection instead of answering")


def _check(status: int, url: str) -> None:
    if status in _MISCONFIGURED:
        raise Misconfigured(f"{url} answered {status}: {_MISCONFIGURED[status]}")
    if 300 <= status < 400:
        raise Misconfigured(f"{url} answered {status}, a redirect, which is not followed: give the address itself")
    if status != 200:
        raise (RemoteRefused if status in _REFUSED else RemoteFailed)(f"{url} answered {status}")


async def _bounded(content: aiohttp.StreamReader, url: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in content.iter_any():
        size += len(part)
        if size > MOST_BYTES:
            raise RemoteFailed(f"{url} answered more than {MOST_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def _read(body: bytes, url: str) -> dict[str, Any]:
    try:
        answer: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if type(answer) is not dict:
        raise RemoteFailed(f"{url} answered what is no JSON object")
    return answer


def _key_in(file: str) -> KeyFile:
    try:
        return KeyFile(Path(file), "api_key_file").follow()
    except ValueError as error:
        raise ValueError(f"api_key_file {file}: {error}") from None


def _tls(ca_file: str | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"ca_file {ca_file}: no readable PEM certificates ({type(error).__name__})") from None
