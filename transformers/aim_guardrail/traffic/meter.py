"""What of an answer has been paid for so far, unary or streamed: by its `usage`, else by what has come of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

import orjson

from aim_guardrail.pipeline.screening import by_size
from aim_guardrail.pipeline.usage import usages_in
from aim_guardrail.traffic.estimate import text_bytes, tokens_of
from aim_kserve.sse import Event, EventReader, EventTooLarge

#: What generated text stands under, in the bodies and events of each protocol: OpenAI's chat and completions, its
#: Responses API, Anthropic's messages, KServe's V1 and V2.
_TEXTS = ("choices", "output", "content", "predictions", "outputs")
_NO_TEXT = frozenset(
    ["id", "object", "role", "type", "index", "finish_reason", "logprobs", "token_ids", "shape", "datatype"]
)


class Meter:
    """One answer. ``prompt``: the tokens of what was asked, as estimated."""

    __slots__ = ("_answer", "_bytes", "_pieces", "_prompt")

    def __init__(self, prompt: int) -> None:
        self._prompt = prompt
        self._answer: int | None = None  # as its last usage says
        self._bytes = self._pieces = 0  # what has come since

    @property
    def answer(self) -> int:
        """The answer's tokens so far: by its usage, and by what has come since. A piece is a token at least."""
        return (self._answer or 0) + max(self._pieces, tokens_of(self._bytes))

    @property
    def is_told(self) -> bool:
        """Whether the predictor has said how many tokens the answer has."""
        return self._answer is not None

    @property
    def total(self) -> int:
        """All tokens to be paid for by now."""
        return self._prompt + self.answer

    def body(self, body: Any) -> None:
        """The whole of a unary answer, parsed."""
        held = [body[name] for name in _TEXTS if name in body] if isinstance(body, dict) else body
        self._bytes += text_bytes(held, _NO_TEXT)
        self._usage(body)

    def raw(self, size: int) -> None:
        """Bytes of an answer that are no JSON."""
        self._bytes += size

    def events(self, events: Iterable[Event]) -> None:
        """Events of a stream, as they come."""
        for event in events:
            if event.data is None or event.data == b"[DONE]":
                continue
            try:
                payload = orjson.loads(event.data)
            except orjson.JSONDecodeError:
                continue
            size = text_bytes(_new_in(payload), _NO_TEXT)
            self._bytes += size
            self._pieces += size > 0
            self._usage(payload)

    def _usage(self, payload: Any) -> None:
        for prompt, answer in usages_in(payload):
            if prompt is not None:
                self._prompt = prompt
            if answer is not None:
                self._answer, self._bytes, self._pieces = answer, 0, 0


def _new_in(payload: Any) -> Any:
    """Of an event: what it adds. One that repeats what came (``response.completed``, ``….done``) adds nothing."""
    if not isinstance(payload, dict):
        return None
    if "choices" in payload:
        return payload["choices"]
    kind = payload.get("type")
    return payload.get("delta") if isinstance(kind, str) and "delta" in kind else None


#: A larger body is not read for its usage.
_MAX_BYTES = 8 * 2**20


async def tapped(chunks: AsyncIterator[bytes], meter: Meter, kind: bytes) -> AsyncIterator[bytes]:
    """An answer's bytes as they come, metered on their way. ``kind``: its content type, in lower case."""
    tap = _Tap(meter, kind)
    try:
        async for chunk in chunks:
            tap.feed(chunk)
            yield chunk
        await tap.finish()
    finally:
        tap.close()


class _Tap:
    def __init__(self, meter: Meter, kind: bytes) -> None:
        self._meter = meter
        self._events = EventReader() if kind.startswith(b"text/event-stream") else None
        self._is_json = b"json" in kind
        self._body = bytearray()
        self._size = 0  # of what has been read neither as events nor as JSON

    def feed(self, chunk: bytes) -> None:
        if self._events is not None:
            try:
                self._meter.events(self._events.feed(chunk))
            except EventTooLarge:
                self._events, self._size = None, len(chunk)
            return
        self._size += len(chunk)
        if self._is_json and self._size <= _MAX_BYTES:
            self._body += chunk

    async def finish(self) -> None:
        """The answer is complete."""
        if self._events is not None:
            self._meter.events(self._events.rest())
        elif self._is_json and self._size <= _MAX_BYTES:
            with suppress(orjson.JSONDecodeError):
                self._meter.body(await by_size(self._size, orjson.loads, bytes(self._body)))
                self._size = 0

    def close(self) -> None:
        """What has not been read counts by its bytes."""
        self._meter.raw(self._size)
