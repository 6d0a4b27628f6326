"""Reading JSON bodies and answering JSON, errors and server-sent events, on bare ASGI.

The OpenAI routes of both processes are hot: they use these few functions instead of FastAPI's dependency
machinery (KServe's V1/V2 routes stay on FastAPI).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, TypeVar

import orjson
from starlette.types import Receive, Send

from aim_kserve.errors import BadRequest, ServingError, TooLarge, Unavailable, UnsupportedMedia
from aim_kserve.shortcut import EXTENSION, Leaving, Shortcut
from aim_kserve.sse import sse

JSON = (b"content-type", b"application/json")
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx and its ingress must not buffer a token stream
]
DONE = b"data: [DONE]\n\n"

#: Between values of a body: its parser holds the interpreter for all of them (2 million empty lists: 0.5 s). A comma
#: is at least a token as a rule, in a text as between token ids, so twice the longest context of today is enough.
MAX_COMMAS = 2**21

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client closed the connection before its request was answered."""


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The whole request body.

    Raises:
        TooLarge: more than ``max_bytes``.
        ClientDisconnected: the client left while sending.
        ShutDown: the server ended the request.
    """
    with or_shutdown():
        return await _read_body(receive, max_bytes)


async def _read_body(receive: Receive, max_bytes: int) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        return body
    parts, size = [], 0
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()
    raise ClientDisconnected


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the request body is larger than {max_bytes} bytes: shorten it or raise --max_body_mib")


#: Raw tensors follow a JSON text of this many bytes (KServe V2's and Triton's binary extension).
JSON_LENGTH = b"inference-header-content-length"


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """The first header of that (lower-case) name, or nothing."""
    for key, value in headers:
        if key == name:
            return value
    return b""


def check_media(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
    """That a body is read as what its sender means: JSON as it is, or V2's JSON with raw tensors.

    A JSON object under the label of a form or a text passes: that is what ``curl -d`` sends. Nothing is decompressed,
    so that no request can be larger than it is.

    Raises:
        UnsupportedMedia: the body is compressed, or another kind of document.
    """
    coding = header(headers, b"content-encoding")
    if coding and coding.lower() != b"identity":
        name = coding.decode("latin-1")
        raise UnsupportedMedia(f"content-encoding: {name!r} is not taken: send the body uncompressed")
    kind = header(headers, b"content-type").lower()
    if not body or not kind or b"json" in kind or header(headers, JSON_LENGTH):
        return
    if kind.startswith((b"text/", b"application/x-www-form-urlencoded")) and body.lstrip()[:1] in (b"{", b"["):
        return
    name = kind.decode("latin-1").partition(";")[0]
    raise UnsupportedMedia(f"content-type: {name!r} is not taken: send JSON, content-type: application/json")


def json_length(value: bytes, body_bytes: int) -> int:
    """How much of a body of that many bytes is its JSON, by the header ``inference-header-content-length``.

    Raises:
        BadRequest: it is not a number of bytes, or more than there are.
    """
    length = int(value) if value.isdigit() and len(value) < 20 else -1
    if not 0 <= length <= body_bytes:
        text = value.decode("latin-1")
        raise BadRequest(f"{JSON_LENGTH.decode()}: must be 0 to the body's {body_bytes} bytes (got {text!r})")
    return length


def check_values(body: bytes, most: int = MAX_COMMAS) -> None:
    """Refuse JSON that would hold every other request up while it is parsed. Counting is a hundred times as fast.

    Raises:
        BadRequest: more than ``most`` commas.
    """
    commas = body.count(b",")
    if commas > most:
        raise BadRequest(f"the body has {commas} commas and may have {most}: no model reads so many values, send fewer")


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadRequest: malformed JSON (with line and column), JSON that is not an object, or too many values.
    """
    check_values(body)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(value).__name__}", code="invalid_json")
    return value


def speaks_openai(path: str) -> bool:
    """Whether an error there has OpenAI's shape; KServe's V1 and V2 clients read ``{"error": "text"}``."""
    return path.startswith(("/openai/", "/v1/")) and not path.endswith((":predict", ":explain"))


async def send_bytes(
    send: Send, body: bytes, *, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """One complete response; JSON unless ``headers`` say otherwise."""
    head = [*(headers if headers is not None else [JSON]), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    extra = [(key.encode("latin-1"), text.encode("latin-1")) for key, text in (headers or {}).items()]
    await send_bytes(send, _encoded(value), status=status, headers=[JSON, *extra])


def _encoded(value: Any) -> bytes:
    """Raises ServingError: an engine, or a server behind it, has answered what JSON has no form for, or too deep."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise ServingError(f"the answer cannot be sent as JSON: {error}", code="answer_unsendable") from error


async def send_error(send: Send, error: ServingError) -> None:
    """A refusal in OpenAI's shape, with ``Retry-After`` where the client should come again."""
    await send_json(send, error.body(), status=error.status, headers=error.headers())


async def send_events(send: Send, receive: Receive, events: AsyncGenerator[bytes, None], *, done: bytes = DONE) -> None:
    """:func:`pump_events`, ended as soon as the client leaves.

    Raises:
        ClientDisconnected: the client left before the end; the generator has been closed.
    """
    async with aclosing(events), cancelled_on_disconnect(receive):
        await pump_events(send, events, done=done)


async def pump_events(
    send: Send, events: AsyncGenerator[bytes, None], *, done: bytes = DONE, shortcut: Shortcut | None = None
) -> None:
    """Stream ``events`` (payloads without framing) and end in ``done`` or, on a ServingError and at the end of the
    grace period, an error event and ``done``. The generator is always closed. Events after the first may come by the
    ``shortcut`` while we wait for them."""
    shortcut = shortcut or Shortcut()
    async with aclosing(events):
        await send({"type": "http.response.start", "status": 200, "headers": list(SSE_HEADERS)})
        try:
            with or_shutdown():
                async for payload in events:
                    await send({"type": "http.response.body", "body": sse(payload), "more_body": True})
                    shortcut.is_open = True
        except ServingError as error:
            await send({"type": "http.response.body", "body": sse(orjson.dumps(error.body())), "more_body": True})
        await send({"type": "http.response.body", "body": done})


#: The message of the cancellation with which the server ends a request that outlasts the grace period.
SHUTDOWN = "the grace period is over"


class ShutDown(Unavailable):
    """The request outlasted the grace period."""

    def __init__(self) -> None:
        super().__init__(
            "the server shut down before the answer was complete: ask again, another replica will answer",
            code="shutting_down",
        )


class or_shutdown:
    """``with``: the server's ending of a request becomes an error like any other, so that its client is told.

    Raises:
        ShutDown: the server ended the request.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if _goes_on(error):
            raise ShutDown from None


def is_shutdown(error: BaseException | None) -> bool:
    """Whether that is how the server ends a request."""
    return isinstance(error, asyncio.CancelledError) and error.args == (SHUTDOWN,)


def _goes_on(error: BaseException | None) -> bool:
    """Whether that is how the server ends a request; the task may then go on to say so."""
    if not is_shutdown(error) or (task := asyncio.current_task()) is None:
        return False
    task.uncancel()
    return True


async def wait_disconnected(receive: Receive) -> None:
    """Return when the client has closed its connection (call only after the body has been read)."""
    while (await receive())["type"] != "http.disconnect":
        pass


class cancelled_on_disconnect:
    """``async with``: the body is cancelled when the client leaves (use only after the request body has been read).

    Args:
        scope: the request's, where it is at hand: its server may tell without being asked by a task.

    Raises:
        ClientDisconnected: the client left; everything the body awaited has been cancelled and has ended.
        ShutDown: the server ended the request.
    """

    __slots__ = ("_earlier", "_gone", "_leaving", "_receive", "_task", "_watch")

    def __init__(self, receive: Receive, scope: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._receive = receive
        self._leaving: Leaving | None = scope.get("extensions", {}).get(EXTENSION, {}).get("leaving")
        self._watch: asyncio.Future[None] | None = None
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._earlier = task.cancelling()
        if self._leaving is None or self._leaving.has_left or self._leaving.tell is not None:
            self._leaving, self._watch = None, asyncio.ensure_future(self._wait())
        else:
            self._leaving.tell = self._cancel

    async def _wait(self) -> None:
        await wait_disconnected(self._receive)
        self._cancel()

    def _cancel(self) -> None:
        self._gone = True
        self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._leaving is not None:
            self._leaving.tell = None
        if not self._gone:
            if _goes_on(error):
                raise ShutDown from None
            return
        others = self._task.uncancel() > self._earlier  # somebody else wants this task to end, too
        if error is None or (isinstance(error, asyncio.CancelledError) and not others):
            raise ClientDisconnected from error


async def until_disconnected(receive: Receive, work: asyncio.Future[T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves first.

    Raises:
        ClientDisconnected: the client left; ``work`` has been cancelled and has ended.
    """
    async with cancelled_on_disconnect(receive):
        return await work
    raise AssertionError  # unreachable: mypy takes the context for one that may swallow exceptions
