"""The predictor's answer on its way to the client: checked whole, event by event, or passed through."""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import Any

import orjson
from starlette.types import Scope, Send

from aim_guardrail.asked import usable_only
from aim_guardrail.exact_json import exact
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.blocked import Blocked
from aim_guardrail.pipeline.screening import Screening, by_size
from aim_guardrail.pipeline.timed import Timed
from aim_guardrail.protocols.head import check_headers
from aim_guardrail.protocols.messages import refusal
from aim_guardrail.protocols.routes import speaks_anthropic
from aim_guardrail.protocols.v2 import check_binary
from aim_guardrail.slots.places import Place
from aim_guardrail.slots.slot import Json, Slot, Slots
from aim_guardrail.streams.events import StreamScreen
from aim_guardrail.streams.staged import shown
from aim_guardrail.traffic.visit import Visit
from aim_guardrail.upstream import Answer
from aim_kserve.errors import ServingError, UpstreamFailed, internal_error
from aim_kserve.http import DONE, JSON_LENGTH, or_shutdown, send_bytes
from aim_kserve.sse import EventReader, EventTooLarge, sse

logger = logging.getLogger("aim.server")


class WayBack:
    """One answer's way to the client.

    Args:
        place: what the root of its body is.
        lists_models: whether its models are to be those that whoever asks may use.

    Attributes:
        begun: whether any of the answer has been sent.
    """

    __slots__ = ("_lists_models", "_metrics", "_place", "_scope", "_screening", "_send", "_visit", "begun")

    def __init__(
        self,
        scope: Scope,
        send: Send,
        screening: Screening,
        visit: Visit,
        metrics: Metrics,
        place: Place,
        lists_models: bool,
    ) -> None:
        self._scope, self._send = scope, send
        self._screening, self._visit, self._metrics = screening, visit, metrics
        self._place = place
        self._lists_models = lists_models
        self.begun = False

    async def bring(self, answer: Answer) -> None:
        """Send ``answer`` on, checked as its kind and the policy say.

        Raises:
            Blocked, Unavailable: see :class:`Screening`.
            UpstreamFailed: what the predictor sent cannot be checked, or broke off.
        """
        kind = answer.header(b"content-type").strip().lower()
        if self._screening.guard.watches("answer"):
            answer.headers = check_headers(self._screening, answer.headers)
        if self._lists_models and b"json" in kind and answer.status == 200:
            await self._answer_checked(answer, is_json=True)
        elif not self._screening.guard.watches("answer"):
            await self._stream_through(answer)
        elif answer.header(b"content-encoding") not in (b"", b"identity"):
            raise UpstreamFailed("the predictor compressed its answer unasked: it cannot be checked")
        elif is_events(answer):
            is_off = self._screening.guard.policy.stream.mode == "off"
            await (self._stream_through if is_off else self._stream_checked)(answer)
        elif kind.startswith((b"audio/", b"image/", b"video/")) and b"xml" not in kind:
            await self._stream_through(answer)
        else:
            await self._answer_checked(answer, is_json=b"json" in kind)

    async def _answer_checked(self, answer: Answer, *, is_json: bool) -> None:
        body, head = await answer.read(), answer.headers
        await self._screening.watch.hear(body)
        json_length = answer.header(JSON_LENGTH)
        if body:
            if not is_json:
                self._visit.meter.raw(len(body))
            with Timed(self._screening, self._metrics, "answer"):
                if json_length:
                    body, length = await check_binary(self._screening, "answer", body, json_length)
                    head = [item for item in head if item[0] != JSON_LENGTH]
                    head.append((JSON_LENGTH, str(length).encode()))
                else:
                    body = await (self._check_json if is_json else self._check_text)(body)
        await send_bytes(self._send, body, status=answer.status, headers=[*head, *self._verdict()])

    async def _check_json(self, body: bytes) -> bytes:
        try:
            parsed = await by_size(len(body), _loaded, body)
        except orjson.JSONDecodeError:
            raise UpstreamFailed("the predictor's answer is not the JSON it says it is") from None
        self._screening.heard(parsed)
        if self._visit.counts_tokens:
            self._visit.meter.body(parsed)
        shortened = self._lists_models and usable_only(parsed)
        try:
            changed = await self._screening.screen("answer", boxed(parsed), self._place, len(body))
        except Blocked:
            if not speaks_anthropic(self._scope["path"]):
                raise
            return orjson.dumps(refusal(parsed))
        repeats = self._screening.has_repeated_keys(body, around=type(parsed) is not dict)
        return orjson.dumps(parsed) if changed or shortened or repeats else body

    async def _check_text(self, body: bytes) -> bytes:
        try:
            text = body.decode()
        except UnicodeDecodeError:
            raise UpstreamFailed("the predictor's answer is neither JSON nor text: it cannot be checked") from None
        return (await self._screening.screen_texts("answer", Slots([Slot(text, ("the answer",))])))[0].encode()

    async def _stream_checked(self, answer: Answer) -> None:
        stream, reader = StreamScreen(self._screening, self._metrics), EventReader()
        await self._begin(answer)
        try:
            with or_shutdown():
                pieces = shown(self._screening, self._metrics, stream, self._visit.chunks(answer), reader)
                async with aclosing(pieces):
                    async for piece in pieces:
                        await self._more(piece)
        except EventTooLarge as error:
            await self._more(stream.failure(UpstreamFailed(f"the predictor's stream cannot be checked: {error}")))
        except ServingError as error:
            await self._more(stream.failure(error))
        except Exception:  # process edge: the answer has begun, an error event is all we have left
            logger.exception("%s %s failed in its stream", self._scope["method"], self._scope["path"])
            await self._more(stream.failure(internal_error()))
        finally:
            stream.close()
        await self._send({"type": "http.response.body", "body": b""})
        if stream.complete:
            await answer.drain()

    async def _stream_through(self, answer: Answer) -> None:
        await self._begin(answer, length=answer.length)
        try:
            with or_shutdown():
                async for chunk in self._visit.chunks(answer):
                    await self._more(chunk)
        except ServingError as error:
            if not is_events(answer):
                raise
            await self._more(b"\n\n" + sse(orjson.dumps(error.body())) + DONE)  # whatever has been begun ends here
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self, answer: Answer, length: int | None = None) -> None:
        self.begun = True
        headers = [*answer.headers, *self._verdict()]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        await self._send({"type": "http.response.start", "status": answer.status, "headers": headers})

    async def _more(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    def _verdict(self) -> list[tuple[bytes, bytes]]:
        return [(key.encode(), value.encode()) for key, value in self._screening.headers().items()]


def _loaded(body: bytes) -> Any:
    return exact(orjson.loads(body), body)


def is_events(answer: Answer) -> bool:
    """Whether an answer is a stream of events."""
    return answer.header(b"content-type").strip().lower().startswith(b"text/event-stream")


def boxed(value: Any) -> Json:
    """A JSON value as an object that holds it, an object as itself."""
    return value if type(value) is dict else {"": value}
