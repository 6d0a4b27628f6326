"""Events of OpenAI's Responses API: texts in ``response.*.delta`` events, whole objects in all others."""

from __future__ import annotations

from typing import Any

from aim_guardrail.exact_json import paired, written
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.protocols.places import RESPONSES_EVENT
from aim_guardrail.slots.apply import drop_shadows
from aim_guardrail.slots.slot import Json
from aim_guardrail.streams.text import UNSUPPORTED, StreamText
from aim_kserve.errors import ServingError, UpstreamFailed
from aim_kserve.sse import Event

#: https://platform.openai.com/docs/api-reference/responses-streaming
_TERMINAL = frozenset(["response.completed", "response.failed", "response.incomplete"])
_PLACE = ("item_id", "output_index", "content_index", "summary_index")
#: Deltas of JSON: collected, checked when the event that ends them comes.
_JSON_DELTAS = ("response.function_call_arguments.delta", "response.mcp_call_arguments.delta")


class ResponsesStream:
    """``take`` events; what was held of a text goes out in one more delta before the event that ends it.

    Attributes:
        ended: the response is complete, failed or incomplete.
    """

    def __init__(self, screening: Screening, metrics: Metrics) -> None:
        self.ended = False
        self._screening = screening
        self._metrics = metrics
        self._texts: dict[tuple[Any, ...], tuple[StreamText, Json]] = {}
        self._json: dict[tuple[Any, ...], tuple[list[str], Json]] = {}
        self._json_chars = 0
        self._response: Json = {}
        self._shift = 0  # events sent beyond those that came
        self._number = -1  # sequence_number of the last event sent

    @property
    def held_chars(self) -> int:
        """How much is held back now."""
        return self._json_chars + sum(text.held_chars for text, _ in self._texts.values())

    def take(self, payload: Json, event: Event) -> bytes:
        """What may be sent now. Raises Blocked (then send ``blocked``), DetectorFailed, ServingError."""
        kind: str = payload["type"]
        delta = payload.get("delta")
        if kind in _JSON_DELTAS and isinstance(delta, str):
            pieces, _ = self._json.get(_key(kind, payload), ([], {}))
            pieces.append(delta)
            self._json[_key(kind, payload)] = (pieces, payload)
            self._json_chars += len(delta)
            self._shift -= 1
            return b""
        if kind.endswith(".delta"):
            return self._delta(kind, payload, event)
        before = self._flush(kind, payload)
        changed = self._screening.body("answer", payload, RESPONSES_EVENT)
        if isinstance(payload.get("response"), dict):
            self._response = payload["response"]
        self.ended = kind in _TERMINAL
        return before + self._send(payload, event if not changed else None)

    def flush(self) -> bytes:
        """The stream ends: what was held of texts that no event ended."""
        return self._flush("response.completed", {})

    def blocked(self) -> bytes:
        """How a block ends the stream: the response is incomplete, reason ``content_filter``."""
        self.ended = True
        last = b""
        for text, template in self._texts.values():
            if text.last_words:
                last += self._send({**template, "delta": text.last_words}, None, extra=True)
        details = {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}, "output": []}
        payload = {"type": "response.incomplete", "response": {**self._response, **details}}
        return last + self._send({**payload, "sequence_number": self._number}, None, extra=True)

    def failure(self, error: ServingError) -> bytes:
        payload = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return self._send({**payload, "sequence_number": self._number}, None, extra=True)

    def close(self) -> None:
        for text, _ in self._texts.values():
            text.close()

    def _delta(self, kind: str, payload: Json, event: Event) -> bytes:
        value = payload.get("delta")
        if not isinstance(value, str):
            raise UpstreamFailed(f"the event {kind} cannot be checked", code=UNSUPPORTED)
        key = _key(kind, payload)
        text = self._texts[key][0] if key in self._texts else StreamText(self._screening, self._metrics)
        dropped = drop_shadows(payload)
        self._texts[key] = (text, payload)
        shown = text.push(value)
        if not shown:
            self._shift -= 1
            return b""
        if shown == value and not dropped:
            return self._send(payload, event)
        payload["delta"] = shown
        return self._send(payload, None)

    def _flush(self, kind: str, payload: Json) -> bytes:
        """Held texts that this event ends, each in one more delta of the kind it came in."""
        ends = _key(kind.removesuffix(".done") + ".delta", payload)
        out = b""
        for key in [key for key in self._texts if key == ends or kind in _TERMINAL]:
            text, template = self._texts.pop(key)
            if rest := text.finish():
                out += self._send({**template, "delta": rest}, None, extra=True)
        for key in [key for key in self._json if key == ends or kind in _TERMINAL]:
            pieces, template = self._json.pop(key)
            arguments = paired("".join(pieces))
            self._json_chars -= sum(map(len, pieces))
            shown = self._screening.json_text("answer", arguments)
            out += self._send({**template, "delta": shown}, None, extra=True)
        return out

    def _send(self, payload: Json, event: Event | None, *, extra: bool = False) -> bytes:
        """Frame an event: as it came where nothing is different; its number moved where some were held or added."""
        if "sequence_number" in payload:
            if extra:
                number = self._number + 1
                self._shift += 1
            else:
                number = payload["sequence_number"] + self._shift
            self._number = number
            if event is not None and number != payload["sequence_number"]:
                event = None
            payload = {**payload, "sequence_number": number}
        if event is not None:
            return event.raw
        return b"event: %s\ndata: %s\n\n" % (payload["type"].encode(), written(payload))


def _key(kind: str, payload: Json) -> tuple[Any, ...]:
    return (kind, *(payload.get(place) for place in _PLACE))
