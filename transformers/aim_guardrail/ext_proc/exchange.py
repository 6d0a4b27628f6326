"""One request of Envoy's and its answer: what Envoy tells, message by message, as the proxy would see it.

The proxy is the one that serves HTTP: only what is behind it is another. Where it asks the predictor, Envoy is told to
send the request on as it stands then; what it answers, Envoy is told to put in the place of the predictor's answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Scope

from aim_guardrail.credentials import Credentials
from aim_guardrail.ext_proc import messages
from aim_guardrail.ext_proc.answer import EnvoyAnswer
from aim_guardrail.ext_proc.messages import Headers, ProcessingResponse
from aim_guardrail.proxy import UPSTREAM
from aim_guardrail.upstream import NOT_SENT_ON
from aim_kserve.http import header

#: Of an answer, what Envoy itself says of its framing.
_FRAMING = frozenset([b"content-length", b"transfer-encoding"])


#: In their order.
_STEPS = ("request_headers", "request_body", "response_headers", "response_body")
_ANSWER = 2


class _Asked(NamedTuple):
    """What the proxy asks the predictor."""

    target: str
    headers: Headers
    body: bytes


class OutOfOrder(Exception):
    """What Envoy told is not what comes next of a request. One line."""


class Exchange:
    """``answers`` to Envoy's messages, one for each. Made in the event loop."""

    def __init__(self, app: ASGIApp, credentials: Credentials) -> None:
        self._app, self._credentials = app, credentials
        loop = asyncio.get_running_loop()
        self._body: asyncio.Future[bytes] = loop.create_future()
        self._asked: asyncio.Future[_Asked] = loop.create_future()
        self._answer: asyncio.Future[EnvoyAnswer] = loop.create_future()
        self._begun: asyncio.Future[Message] = loop.create_future()  # the head of what the proxy answers
        self._left = asyncio.Event()
        self._out: list[bytes] = []  # of its body
        self._sent: Headers = []
        self._sent_body = b""
        self._came: Headers = []
        self._is_gathered = self._is_read = False
        self._streams = False
        self._step, self._ended = -1, True  # of _STEPS: the one that Envoy is at, and whether all of it has come
        self._task: asyncio.Task[None] | None = None

    async def answers(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """What Envoy is told, until it tells no more. Raises OutOfOrder."""
        steps = {
            "request_headers": self._request_headers,
            "request_body": self._request_body,
            "response_headers": self._response_headers,
            "response_body": self._response_body,
        }
        try:
            async for request in requests:
                kind = request.WhichOneof("is")
                if kind is None:
                    raise OutOfOrder("a message that says nothing")
                if kind in steps:
                    self._in_order(kind, getattr(request, kind).end_of_stream)
                    yield await steps[kind](getattr(request, kind))
                else:
                    yield _nothing(kind)
        finally:
            self._left.set()
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    def _in_order(self, kind: str, is_end: bool) -> None:
        """Raises OutOfOrder: this cannot come now. Nothing that has not been judged may follow what has."""
        step, goes_on = _STEPS.index(kind), kind.endswith("_body") and _STEPS.index(kind) == self._step
        asked = step < _ANSWER or self._asked.done()
        begun = step == 0 or (self._step >= 0 and (step != _ANSWER + 1 or self._step >= _ANSWER))
        if not (asked and begun and (step > self._step or goes_on)) or (goes_on and self._ended):
            raise OutOfOrder(f"{kind} behind {_STEPS[self._step] if self._step >= 0 else 'nothing'}")
        if kind.endswith("_body") and not goes_on and self._ended and self._step == step - 1:
            raise OutOfOrder(f"{kind} behind headers that end it")
        self._step, self._ended = step, is_end

    # --- the way there --------------------------------------------------------------------------------------------

    async def _request_headers(self, message: Any) -> Any:
        self._sent = messages.headers_of(message)
        self._task = asyncio.create_task(self._app(self._scope(), self._receive, self._send))  # type: ignore[arg-type]
        if message.end_of_stream:
            self._body.set_result(b"")
            return await self._decided("request_headers")
        return _with_mode(_nothing("request_headers"), messages.BODY_BUFFERED)

    async def _request_body(self, message: Any) -> Any:
        self._sent_body += message.body
        if not message.end_of_stream:  # in pieces, against our word
            self._is_gathered = True
            told = _nothing("request_body")
            told.request_body.response.body_mutation.clear_body = True
            return told
        self._body.set_result(self._sent_body)
        return await self._decided("request_body")

    async def _decided(self, step: str) -> Any:
        """What becomes of the request: sent on, or answered by us."""
        await self._first(self._asked)
        if not self._asked.done():
            return self._immediate()
        asked, told = self._asked.result(), _nothing(step)
        response = getattr(told, step).response
        kept = [item for item in self._sent if item[0].startswith(b":") or item[0] in NOT_SENT_ON]
        kept = [(name, asked.target.encode("latin-1") if name == b":path" else value) for name, value in kept]
        if asked.body != self._sent_body or self._is_gathered:
            response.body_mutation.body = asked.body
            kept = [item for item in kept if item[0] != b"content-length"]
            kept.append((b"content-length", str(len(asked.body)).encode()))
        response.header_mutation.CopyFrom(messages.mutation(self._sent, [*kept, *asked.headers]))
        return told

    # --- the way back ---------------------------------------------------------------------------------------------

    async def _response_headers(self, message: Any) -> Any:
        self._came = messages.headers_of(message)
        if not (header(self._came, b":status") or b"200").isdigit():
            raise OutOfOrder("a :status that is no number")
        answer = EnvoyAnswer(self._came)
        self._answer.set_result(answer)
        if message.end_of_stream:
            answer.feed(b"", end=True)
            await self._first()
        else:
            await self._first(self._begun, answer.wanted)
        if self._done:
            return self._changed_head() if message.end_of_stream and not any(self._out) else self._immediate()
        self._streams = self._begun.done()
        if self._streams:
            return _with_mode(self._changed_head(), messages.BODY_STREAMED)
        return _with_mode(_nothing("response_headers"), messages.BODY_BUFFERED)

    async def _response_body(self, message: Any) -> Any:
        if not self._streams and not message.end_of_stream:
            raise OutOfOrder("a piece of response_body, which was asked for as a whole")
        answer, told = self._answer.result(), _nothing("response_body")
        response = told.response_body.response
        answer.feed(message.body, end=message.end_of_stream)
        await (self._first() if message.end_of_stream else self._first(answer.wanted))
        body = b"".join(self._out)
        self._out.clear()
        if not self._streams:
            response.header_mutation.CopyFrom(messages.mutation(self._came, self._head(len(body))))
        if body:
            response.body_mutation.body = body
        else:
            response.body_mutation.clear_body = True
        return told

    def _changed_head(self) -> Any:
        told = _nothing("response_headers")
        told.response_headers.response.header_mutation.CopyFrom(messages.mutation(self._came, self._head(None)))
        return told

    def _head(self, length: int | None) -> Headers:
        """The head of the proxy's answer, for a body of this length; None: of one that is not known."""
        begun = self._begun.result()
        head = [(b":status", str(begun["status"]).encode())]
        head += [(name.lower(), value) for name, value in begun["headers"] if name.lower() not in _FRAMING]
        head += [item for item in self._came if item[0] in (b"date", b"connection", b"transfer-encoding")]
        return head if length is None else [*head, (b"content-length", str(length).encode())]

    def _immediate(self) -> Any:
        """All of the proxy's answer at once: nothing of the predictor's is shown."""
        told, begun = ProcessingResponse(), self._begun.result()
        told.immediate_response.status.code = begun["status"]
        told.immediate_response.body = b"".join(self._out)
        head = [(name.lower(), value) for name, value in begun["headers"] if name.lower() not in _FRAMING]
        told.immediate_response.headers.CopyFrom(messages.mutation([], head))
        self._out.clear()
        return told

    # --- as the proxy sees it -------------------------------------------------------------------------------------

    def _scope(self) -> Scope:
        path, _, query = header(self._sent, b":path").partition(b"?")
        return {
            "type": "http",
            "method": header(self._sent, b":method").decode("latin-1"),
            "path": messages.unquoted(path),
            "raw_path": path,
            "query_string": query,
            "headers": [item for item in self._sent if not item[0].startswith(b":")],
            "client": ("127.0.0.1", 0),  # Envoy: whom it speaks for stands in x-forwarded-for
            UPSTREAM: self,
        }

    async def send(self, method: str, target: str, headers: Headers, body: bytes) -> EnvoyAnswer:
        """In the place of `upstream.Upstream.send`."""
        self._asked.set_result(_Asked(target, self._credentials.sent(headers), body))
        return await self._answer

    async def _receive(self) -> Message:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": await self._body}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun.set_result(message)
        elif message.get("body"):
            self._out.append(message["body"])

    @property
    def _done(self) -> bool:
        """Whether the proxy has ended."""
        return self._task is not None and self._task.done()

    async def _first(self, *moments: asyncio.Future[Any] | asyncio.Event) -> None:
        """Until one of these has come, or the proxy has ended. Raises what the proxy did."""
        assert self._task is not None
        waits = [asyncio.ensure_future(m.wait()) if isinstance(m, asyncio.Event) else m for m in moments]
        await asyncio.wait([self._task, *waits], return_when=asyncio.FIRST_COMPLETED)
        for moment, wait in zip(moments, waits, strict=True):
            if isinstance(moment, asyncio.Event):
                wait.cancel()
        if self._done:
            self._task.result()


def _nothing(kind: str) -> Any:
    """Envoy is to go on with this step as it is."""
    told = ProcessingResponse()
    getattr(told, kind).SetInParent()
    return told


def _with_mode(told: Any, body_mode: int) -> Any:
    """Envoy is to send bodies so: whole, or as they come."""
    mode = told.mode_override
    mode.request_header_mode = mode.response_header_mode = messages.HEADERS_SEND
    mode.request_body_mode, mode.response_body_mode = messages.BODY_BUFFERED, body_mode
    return told
