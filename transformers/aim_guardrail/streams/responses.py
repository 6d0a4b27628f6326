"""Events of OpenAI's Responses API and of its transcriptions: texts in ``*.delta`` events, all others are whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.protocols.places import RESPONSES_EVENT
from aim_guardrail.slots.apply import drop_shadows
from aim_guardrail.slots.places import JSON
from aim_guardrail.slots.slot import Json
from aim_guardrail.streams.accumulators import Accumulators
from aim_guardrail.streams.frame import Frame, Piece, Said, Whole, done
from aim_guardrail.streams.text import UNSUPPORTED, beside, check_whole
from aim_kserve.errors import ServingError, UpstreamFailed
from aim_kserve.sse import Event

#: https://platform.openai.com/docs/api-reference/responses-streaming
_TERMINAL = frozenset(["response.completed", "response.failed", "response.incomplete", "transcript.text.done"])
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
        self._texts = Accumulators[Json](screening, metrics)
        self._response: Json = {}
        self._shift = 0  # events sent beyond those that came
        self._number = self._came = -1  # sequence_number of the last event sent, and of the last that came

    @property
    def held_chars(self) -> int:
        """How much is held back now."""
        return self._texts.held_chars

    def take(self, payload: Json, event: Event) -> list[Frame]:
        """What may be sent now. Raises Blocked (then send ``blocked``), DetectorFailed, ServingError."""
        kind: str = payload["type"]
        self._came = payload.get("sequence_number", self._came)
        if kind.endswith(".delta"):
            return self._delta(kind, payload, event)
        before = self._flush(kind, payload)
        changed = self._screening.body("answer", payload, RESPONSES_EVENT)
        if isinstance(payload.get("response"), dict):
            self._response = payload["response"]
        self.ended = kind in _TERMINAL
        return [*before, self._frame(payload, event if not changed else None)]

    def flush(self) -> list[Frame]:
        """The stream ends: what was held of texts that no event ended."""
        return [*self._flush("response.completed", {}), done()]

    def blocked(self, *, last_words: bool = True) -> list[Frame]:
        """How a block ends the stream: the response is incomplete, reason ``content_filter``."""
        self.ended = True
        words = self._texts.last_words() if last_words else ()
        said = [self._frame({**template, "delta": text}, None, extra=True) for template, text in words]
        if not self._response:  # a transcript has nothing that says so
            error = ServingError("the answer was blocked by the guardrail", code="content_filter", status=400)
            return [*said, Frame(error.body()), done()]
        details = {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}, "output": []}
        payload = {"type": "response.incomplete", "response": {**self._response, **details}}
        return [*said, self._frame({**payload, "sequence_number": self._number}, None, extra=True)]

    def failure(self, error: ServingError) -> list[Frame]:
        payload = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return [self._frame({**payload, "sequence_number": self._number}, None, extra=True)]

    def withdraw(self, frames: Sequence[Frame] | None) -> None:
        """These frames are not sent after all: their numbers are free. None: events were sent as they came."""
        if frames is None:
            self._number = self._came
            return
        numbers = [frame.payload["sequence_number"] for frame in frames if "sequence_number" in frame.payload]
        self._number = numbers[0] - 1 if numbers else self._number

    def close(self) -> None:
        self._texts.close()

    def read(self, frame: Frame) -> Said:
        """What a frame says."""
        payload = frame.payload
        kind, delta = str(payload.get("type")), payload.get("delta", "")
        if not kind.endswith(".delta"):
            return Said([], [Whole(payload, None, RESPONSES_EVENT)] if payload else [], [""])
        wholes = [Whole(payload, name, RESPONSES_EVENT.get(name)) for name in beside(payload, "delta", RESPONSES_EVENT)]
        if kind in _JSON_DELTAS:
            return Said([], [Whole(payload, "delta", JSON), *wholes])
        return Said([Piece(("", *_key(kind, payload)), payload, "delta", delta)], wholes)

    def _delta(self, kind: str, payload: Json, event: Event) -> list[Frame]:
        value = payload.get("delta")
        if not isinstance(value, str):
            raise UpstreamFailed(f"the event {kind} cannot be checked", code=UNSUPPORTED)
        changed = drop_shadows(payload)
        if others := beside(payload, "delta", RESPONSES_EVENT):
            changed = check_whole(self._screening, payload, others, RESPONSES_EVENT) or changed
        if kind in _JSON_DELTAS:
            self._texts.json(_key(kind, payload), payload, value)
            self._shift -= 1
            return []
        shown = self._texts.text(_key(kind, payload), payload, value)
        if not shown:
            self._shift -= 1
            return []
        if shown == value and not changed:
            return [self._frame(payload, event)]
        return [self._frame({**payload, "delta": shown}, None)]

    def _flush(self, kind: str, payload: Json) -> list[Frame]:
        """Held texts that this event ends, each in one more delta of the kind it came in."""
        ended, every = _key(kind.removesuffix(".done") + ".delta", payload), kind in _TERMINAL
        rests = self._texts.end(lambda key: every or key == ended)
        return [self._frame({**template, "delta": rest}, None, extra=True) for template, rest in rests]

    def _frame(self, payload: Json, event: Event | None, *, extra: bool = False) -> Frame:
        """An event: as it came where nothing is different; its number moved where some were held or added."""
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
        return Frame(payload, None if event is None else event.raw, payload["type"])


def _key(kind: str, payload: Json) -> tuple[Any, ...]:
    return (kind, *(payload.get(place) for place in _PLACE))
