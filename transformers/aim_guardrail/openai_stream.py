"""OpenAI's streamed answers, checked: events in, events out that may be shown.

Chat and completion chunks (``choices``) and the Responses API's events (``response.*``) are told by their shape, not
by the route they came on. Every streamed text has its own StreamGuard per choice and field (content, reasoning,
refusal, whatever comes next); a tool call's arguments are collected and checked when they are complete, because
they are JSON. What is neither is checked as a whole, and what cannot be checked ends the stream with an error.
"""

from __future__ import annotations

from typing import Any

import orjson

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import DetectorFailed
from aim_guardrail.screen import NOT_TEXT, SHADOWS, Blocked, Json, Screening, drop_shadows
from aim_guardrail.sse import Event
from aim_guardrail.stream import StreamGuard
from aim_kserve.errors import ServingError, UpstreamFailed
from aim_kserve.http import DONE, sse

_CHUNK_FIELDS = NOT_TEXT | {"choices", "usage", "metrics", *SHADOWS}
_CHOICE_FIELDS = NOT_TEXT | {"delta", "text", "stop_reason", *SHADOWS}
_UNSUPPORTED = "unsupported_stream"
_TERMINAL = frozenset(["response.completed", "response.failed", "response.incomplete", "error"])


class StreamScreen:
    """One streamed answer. ``feed`` events, send what it gives; stop when ``ended``.

    Attributes:
        ended: nothing may follow (``[DONE]``, the Responses API's last event, or a block).
        blocked: the guardrail ended it.
    """

    def __init__(self, screening: Screening, metrics: Metrics) -> None:
        self.ended = self.blocked = False
        self._screening = screening
        self._metrics = metrics
        self._choices: dict[int, _Choice] = {}
        self._responses = _Responses(self)
        self._last: Json = {}

    def feed(self, event: Event) -> bytes:
        """What may be sent now that ``event`` has come; may be empty.

        Raises:
            ServingError: the stream cannot go on; see :meth:`failure`.
        """
        try:
            return self._take(event)
        except DetectorFailed as error:
            raise self._screening.failed(error) from error
        except Blocked:
            self.ended = self.blocked = True
            return self._responses.blocked() if self._responses.seen else self._blocked()

    def failure(self, error: ServingError) -> bytes:
        """How a stream that has begun tells ``error`` and ends."""
        self.ended = True
        if self._responses.seen:
            return self._responses.failure(error)
        return sse(orjson.dumps(error.body())) + DONE

    def close(self) -> None:
        """Count what texts that were never finished came to."""
        for choice in self._choices.values():
            choice.close()
        self._responses.close()

    # --- one event ------------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> bytes:
        if event.data is None:
            return b":\n\n" if event.raw.startswith(b":") else b""  # a keep-alive; its text is nobody's business
        if event.data == b"[DONE]":
            self.ended = True
            return self._flush(self._last) + DONE
        try:
            payload = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            payload = None
        if not isinstance(payload, dict):
            raise UpstreamFailed("the predictor's stream holds what is not a JSON object", code="predictor_invalid")
        if type(payload.get("choices")) is list:
            return self._chunk(payload, event)
        if isinstance(payload.get("type"), str) and (payload["type"].startswith("response.") or event.name):
            return self._responses.take(payload, event)
        if "error" in payload:
            self._screening.body("answer", payload)
            return sse(orjson.dumps(payload))
        raise UpstreamFailed("the predictor's stream is of a kind the guardrail cannot check", code=_UNSUPPORTED)

    def _chunk(self, chunk: Json, event: Event) -> bytes:
        screening, before, changed, held = self._screening, b"", False, 0
        if not chunk.keys() <= _CHUNK_FIELDS:
            changed = screening.body("answer", {key: value for key, value in chunk.items() if key not in _CHUNK_FIELDS})
            if changed:
                raise UpstreamFailed("a field of the predictor's stream holds what the policy refuses")
        self._last = chunk
        for item in chunk["choices"]:
            choice = self._choice(item)
            was = choice.take(item)
            changed = changed or was != _SAME
            held += was == _HELD
            if item.get("finish_reason") is not None:
                before += self._flushed(chunk, choice)
        if held and held == len(chunk["choices"]) and not chunk.get("usage"):
            return before
        return before + (sse(orjson.dumps(chunk)) if changed else event.raw)

    def _choice(self, item: Any) -> _Choice:
        index = item.get("index", 0) if isinstance(item, dict) else None
        if type(index) is not int:
            raise UpstreamFailed("a choice of the predictor's stream is not an object with an index")
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(index, self._screening, self._metrics)
        return choice

    def _flush(self, template: Json) -> bytes:
        return b"".join(self._flushed(template, choice) for choice in self._choices.values() if not choice.finished)

    def _flushed(self, template: Json, choice: _Choice) -> bytes:
        item = choice.flush()
        return self._frame(template, [item]) if item is not None else b""

    def _frame(self, template: Json, items: list[Json]) -> bytes:
        frame = {key: value for key, value in template.items() if key != "usage"}
        return sse(orjson.dumps({**frame, "choices": items}))

    def _blocked(self) -> bytes:
        items = [choice.refused() for choice in self._choices.values() if not choice.finished]
        return self._frame(self._last, items) + DONE


_SAME, _CHANGED, _HELD = 0, 1, 2


class _Text:
    """One streamed text and, while nothing in it was replaced, the log probabilities that belong to what is shown."""

    __slots__ = ("_guard", "_held", "_metrics", "_screening", "shadows", "verdict")

    def __init__(self, screening: Screening, metrics: Metrics) -> None:
        self._screening = screening
        self._metrics = metrics
        self._guard = StreamGuard(screening.guard, screening.session)
        self._held = ""
        self.verdict: Any = None

    def push(self, delta: str) -> str:
        released = self._guard.push(delta)
        return self._take(released)

    def finish(self) -> str:
        text = self._take(self._guard.finish())
        self.close()
        return text

    def _take(self, released: Any) -> str:
        self.verdict = released.verdict
        if released.verdict.blocked:
            verdict = self.verdict
            self.close()
            raise Blocked("the answer", verdict)
        text: str = released.text
        return text

    def close(self) -> None:
        """Count the verdict, once."""
        if self.verdict is not None:
            self._screening.note("answer", self.verdict)
            self.verdict = None


class _Choice:
    """One choice of a chat or completion stream."""

    __slots__ = ("_calls", "_is_chat", "_metrics", "_screening", "_texts", "finished", "index")

    def __init__(self, index: int, screening: Screening, metrics: Metrics) -> None:
        self.index = index
        self.finished = False
        self._is_chat = True
        self._screening = screening
        self._metrics = metrics
        self._texts: dict[str, _Text] = {}
        self._calls: dict[int, str] = {}

    def take(self, item: Json) -> int:
        """Check one chunk's choice in place: same, changed, or nothing left worth sending."""
        if not item.keys() <= _CHOICE_FIELDS and self._screening.body(
            "answer", {key: value for key, value in item.items() if key not in _CHOICE_FIELDS}
        ):
            raise UpstreamFailed("a field of the predictor's stream holds what the policy refuses")
        self.finished = False
        holder: Json = item["delta"] if isinstance(item.get("delta"), dict) else item
        self._is_chat = holder is not item
        outcome = _CHANGED if drop_shadows(item) else _SAME
        for key, value in list(holder.items()) if self._is_chat else [("text", item.get("text"))]:
            if not value or key == "role":
                continue
            if isinstance(value, str):
                was = self._push(holder, key, value)
            elif key == "tool_calls":
                was = self._tool_calls(value)
            else:
                raise UpstreamFailed(f"the guardrail cannot check the streamed field {key!r}", code=_UNSUPPORTED)
            outcome = max(outcome, was)
        if outcome == _HELD and (item.get("finish_reason") or _says_something(holder)):
            return _CHANGED
        return outcome

    def _push(self, holder: Json, key: str, value: str) -> int:
        text = self._texts.get(key)
        if text is None:
            text = self._texts[key] = _Text(self._screening, self._metrics)
        shown = text.push(value)
        if shown == value:
            return _SAME
        holder[key] = shown
        return _CHANGED if shown else _HELD

    def _tool_calls(self, calls: list[Json]) -> int:
        """Hold the arguments back, let the rest (id, type, name) pass checked."""
        outcome = _HELD
        for position, call in enumerate(calls):
            function = call.get("function")
            if isinstance(function, dict) and function.get("arguments"):
                index = call.get("index", position)
                self._calls[index] = self._calls.get(index, "") + function["arguments"]
                function["arguments"] = ""
            if call.get("id") or (isinstance(function, dict) and function.get("name")):
                outcome = _CHANGED
            self._screening.body("answer", call, skip=NOT_TEXT)
        return outcome

    def flush(self) -> Json | None:
        """The choice ends: what was still held, as a choice of one more chunk."""
        self.finished = True
        delta: Json = {}
        for key, text in self._texts.items():
            if rest := text.finish():
                delta[key] = rest
        self._texts.clear()
        if self._calls:
            delta["tool_calls"] = [
                {"index": index, "function": {"arguments": self._screening.json_text("answer", arguments)}}
                for index, arguments in self._calls.items()
            ]
            self._calls.clear()
        return self._item(delta, None) if delta else None

    def refused(self) -> Json:
        """The choice as a block ends it."""
        return self._item({} if self._is_chat else {"text": ""}, "content_filter")

    def _item(self, delta: Json, finish_reason: str | None) -> Json:
        content = {"delta": delta} if self._is_chat else delta
        return {"index": self.index, **content, "logprobs": None, "finish_reason": finish_reason}

    def close(self) -> None:
        for text in self._texts.values():
            text.close()


def _says_something(holder: Json) -> bool:
    """Whether more than emptied texts is left in a delta."""
    return any(value for key, value in holder.items() if key not in ("index", "tool_calls")) or any(
        call.get("id") or (call.get("function") or {}).get("name") for call in holder.get("tool_calls") or ()
    )


class _Responses:
    """The Responses API's events: texts by item and part, whole objects checked as they come."""

    def __init__(self, stream: StreamScreen) -> None:
        self.seen = False
        self._stream = stream

    def take(self, payload: Json, event: Event) -> bytes:
        raise UpstreamFailed("streams of the Responses API: ask for stream: false", code=_UNSUPPORTED)

    def blocked(self) -> bytes:
        return b""

    def failure(self, error: ServingError) -> bytes:
        return b""

    def close(self) -> None:
        pass
