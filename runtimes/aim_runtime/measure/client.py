"""One request to an OpenAI-compatible server, timed token by token; and what such a server says of itself.

Times are the event loop's clock. A failure is an outcome of a kind, never an exception: load goes on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import aiohttp

from aim_kserve.identity.key_file import read_key
from aim_kserve.sse import EventReader, EventTooLarge
from aim_runtime.measure.errors import MeasureError

_PROBE_S = 10.0
_READ_BYTES = 64 * 1024


class Refusal(NamedTuple):
    """How a request was refused before its answer began. code: the error's; retry_after_s: None where the server names
    no number of seconds."""

    status: int
    code: str | None
    retry_after_s: float | None


@dataclass(slots=True)
class Outcome:
    """What became of a request. due_s: when it was to be sent; sent_s: when it was; tokens_s: when each piece of the
    answer came; output_tokens: as the server counts them. failed: the kind of failure, None: it was answered; refusal:
    where it was an HTTP status."""

    due_s: float
    sent_s: float
    ended_s: float = 0.0
    tokens_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    failed: str | None = None
    refusal: Refusal | None = None


class Failure(Exception):
    """A request that was not answered; its text is the kind."""


class Client:
    """Connections to one server, as many as there are requests at once.

    Args:
        url: of the server, without ``/v1``.
        timeout_s: of a whole request.
        key_file: holds a bearer token; None sends none.

    Raises:
        MeasureError: the key cannot be read.
    """

    def __init__(self, url: str, *, timeout_s: float, key_file: Path | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._headers = {"authorization": f"Bearer {_key(key_file)}"} if key_file else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_PROBE_S),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def say(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON (or, where it is none, the text) that it answers to a GET, or a POST where there is a body; None:
        it answers something else than 200.

        Raises:
            MeasureError: nobody answers.
        """
        assert self._session is not None
        method = "GET" if body is None else "POST"
        try:
            async with (
                asyncio.timeout(_PROBE_S),
                self._session.request(method, self.url + path, json=body) as answer,
            ):
                if answer.status == 401:
                    raise MeasureError(f"--url {self.url}: {path} answers 401: give the key (--api-key-file)")
                text = (await answer.read()).decode("utf-8", "replace")
                return _as_json(text) if answer.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            reason = str(error) or f"no answer in {_PROBE_S:g} s"
            raise MeasureError(f"--url {self.url}: {reason}: give the address of a running server") from None

    async def ask(self, path: str, body: Mapping[str, Any], due_s: float) -> Outcome:
        """Send it now and follow its answer to the end. due_s: when it should have been sent."""
        now = asyncio.get_running_loop().time
        outcome = Outcome(due_s, now())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._follow(path, body, outcome)
        except TimeoutError:
            outcome.failed = "timeout"
        except asyncio.CancelledError:
            outcome.failed = "cut off"
        except Failure as failure:
            outcome.failed = str(failure)
        except (aiohttp.ClientError, OSError, EventTooLarge):
            outcome.failed = "connection"
        outcome.ended_s = now()
        return outcome

    async def _follow(self, path: str, body: Mapping[str, Any], outcome: Outcome) -> None:
        assert self._session is not None
        now = asyncio.get_running_loop().time
        reader, done = EventReader(), False
        async with self._session.post(self.url + path, json=body) as answer:
            if answer.status != 200:
                outcome.refusal = _refusal(answer.status, answer.headers, await answer.content.read(_READ_BYTES))
                raise Failure(f"http {answer.status}")
            async for chunk in answer.content.iter_chunked(_READ_BYTES):
                at = now()
                for event in reader.feed(chunk):
                    done = done or event.data == b"[DONE]"
                    if event.data and not done:
                        _take(event.data, at, outcome)
        if not done:
            raise Failure("broken stream")
        if not outcome.output_tokens or not outcome.tokens_s:
            raise Failure("no tokens")


def _refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    try:
        error = json.loads(body)["error"]
        code = str(error["code"]) if error["code"] is not None else None
    except (ValueError, LookupError, TypeError):
        code = None
    wait = headers.get("retry-after", "")
    return Refusal(status, code, float(wait) if wait.isdecimal() else None)


def _take(data: bytes, at: float, outcome: Outcome) -> None:
    try:
        said = json.loads(data)
        if "error" in said:
            raise Failure("error in stream")
        for choice in said.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if text:
                outcome.tokens_s.append(at)
                outcome.text += text
        if usage := said.get("usage"):
            outcome.prompt_tokens = int(usage["prompt_tokens"])
            outcome.output_tokens = int(usage["completion_tokens"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Failure("malformed stream") from None


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _key(file: Path) -> str:
    try:
        return read_key(file).decode()
    except ValueError as error:
        raise MeasureError(f"--api-key-file {file}: {error}", exit_code=2) from None
