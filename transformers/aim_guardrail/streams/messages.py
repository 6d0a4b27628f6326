"""Events of Anthropic's Messages API: content blocks that begin, go on in deltas and end, within one message.

https://docs.anthropic.com/en/docs/build-with-claude/streaming
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.protocols.messages import BLOCK_DELTA, EVENT, error_body
from aim_guardrail.slots.slot import Json
from aim_guardrail.streams.delta import Delta
from aim_guardrail.streams.frame import Frame, Said, Whole, done
from aim_guardrail.streams.pieces import DeltaPieces
from aim_guardrail.streams.text import UNSUPPORTED, beside, check_whole
from aim_guardrail.streams.walk import HELD, SAME
from aim_kserve.errors import ServingError, UpstreamFailed
from aim_kserve.sse import Event

KINDS = frozenset(
    [
        *("message_start", "message_delta", "message_stop", "ping"),
        *("content_block_start", "content_block_delta", "content_block_stop"),
    ]
)
_MOST_OPEN = 512
#: What a block's start may hold already, and the delta that says the same.
_FIRST = {"text": "text_delta", "thinking": "thinking_delta"}

#: A message that nothing is said in yet.
_EMPTY: Json = {"type": "message", "role": "assistant", "content": [], "stop_reason": None, "stop_sequence": None}

_Key = tuple[int, str]
"""Of one kind of delta of one block."""


class MessagesStream:
    """``take`` events; what was held of a block goes out in one more delta before the event that ends it.

    Attributes:
        ended: the message is complete, or an error ended it.
    """

    def __init__(self, screening: Screening, metrics: Metrics) -> None:
        self.ended = False
        self._screening = screening
        self._metrics = metrics
        self._deltas: dict[_Key, Delta] = {}
        self._pieces: dict[_Key, DeltaPieces] = {}
        self._open: dict[int, None] = {}  # blocks that have begun and not ended
        self._begun = False
        self._about: Json = {}  # of the message
        self._usage: Json = {}

    @property
    def held_chars(self) -> int:
        """How much is held back now, of all blocks."""
        return sum(delta.held_chars for delta in self._deltas.values())

    def take(self, payload: Json, event: Event) -> list[Frame]:
        """What may be sent now. Raises Blocked (then send ``blocked``), DetectorFailed, ServingError."""
        kind = payload["type"]
        if kind == "content_block_delta":
            return self._delta(payload, event)
        first = self._taken_out(payload) if kind == "content_block_start" else []
        before = self._rest(_index(payload) if kind == "content_block_stop" else None) if kind in _ENDS else []
        changed = self._screening.body("answer", payload, EVENT)
        self._note(kind, payload)
        frames = [*before, Frame(payload, None if changed or first else event.raw, kind)]
        for delta in first:
            frames += self._delta(delta, None)
        return frames

    def flush(self) -> list[Frame]:
        """The stream ends: what was held of blocks that no event ended."""
        return [*self._rest(None), done()]

    def blocked(self, *, last_words: bool = True) -> list[Frame]:
        """How a block ends the stream: its content blocks end, and the message with ``stop_reason: refusal``."""
        self.ended = True
        if not self._begun and not self._about:
            error = ServingError("the answer was blocked by the guardrail", code="content_filter", status=400)
            return self.failure(error)
        begins = [] if self._begun else [_event("message_start", message={**self._about, **_EMPTY})]
        words = [(key, delta.last_words()) for key, delta in self._deltas.items()] if last_words else []
        frames = [*begins, *(_more(key, said) for key, said in words if said)]
        frames += [_event("content_block_stop", index=index) for index in self._open]
        reason = {"stop_reason": "refusal", "stop_sequence": None}
        usage = {"output_tokens": 0, **self._usage}
        return [*frames, _event("message_delta", delta=reason, usage=usage), _event("message_stop")]

    def failure(self, error: ServingError) -> list[Frame]:
        return [Frame(error_body(error), None, "error")]

    def withdraw(self, frames: Sequence[Frame] | None) -> None:
        """These frames are not sent after all: what they begin has not begun, what they end is open."""
        if frames:
            self.ended = False
        for frame in reversed(frames or ()):
            kind, index = frame.payload.get("type"), frame.payload.get("index", 0)
            if kind == "content_block_start":
                self._open.pop(index, None)
            elif kind == "content_block_stop":
                self._open[index] = None
            elif kind == "message_start":
                self._begun = False

    def close(self) -> None:
        for delta in self._deltas.values():
            delta.close()

    def read(self, frame: Frame) -> Said:
        """What a frame says."""
        payload, said = frame.payload, Said()
        kind = payload.get("type")
        if kind == "content_block_delta":
            key = _key(payload)
            if key not in self._pieces:
                self._pieces[key] = DeltaPieces(BLOCK_DELTA, key[0])
            self._pieces[key].read(payload["delta"], said)
            said.wholes += [Whole(payload, name, EVENT.get(name)) for name in beside(payload, "delta", EVENT)]
            return said
        if kind in _ENDS:
            ended = {payload.get("index", 0)} if kind == "content_block_stop" else {key[0] for key in self._pieces}
            said.ends += ended
            self._pieces = {key: pieces for key, pieces in self._pieces.items() if key[0] not in ended}
        said.wholes += [Whole(payload, None, EVENT)] if payload else []
        return said

    def _delta(self, payload: Json, event: Event | None) -> list[Frame]:
        """A piece of a block, checked in place."""
        key = _key(payload)
        delta = self._deltas.get(key)
        if delta is None:
            delta = self._deltas[key] = Delta(self._screening, self._metrics, BLOCK_DELTA)
            if len(self._deltas) > _MOST_OPEN:
                raise UpstreamFailed(
                    f"a message of the predictor's stream has more than {_MOST_OPEN} blocks open", code=UNSUPPORTED
                )
        changed = bool(others := beside(payload, "delta", EVENT)) and check_whole(
            self._screening, payload, others, EVENT
        )
        became = delta.take(payload["delta"])
        earlier = [_more(key, said) for said in delta.earlier]
        if became == HELD and not others:
            return earlier
        return [
            *earlier,
            Frame(payload, event.raw if event and became == SAME and not changed else None, "content_block_delta"),
        ]

    def _taken_out(self, payload: Json) -> list[Json]:
        """The text that a block begins with, as the deltas it might have been."""
        block: Any = payload.get("content_block")
        first: list[Json] = []
        if not isinstance(block, dict):
            return first
        for name, kind in _FIRST.items():
            if isinstance(block.get(name), str) and block[name]:
                delta = {"type": kind, name: block[name]}
                first.append({"type": "content_block_delta", "index": _index(payload), "delta": delta})
                block[name] = ""
        return first

    def _rest(self, index: int | None) -> list[Frame]:
        """What was held of a block, or, where that is None, of all."""
        frames = []
        for key in [key for key in self._deltas if index is None or key[0] == index]:
            if said := self._deltas[key].finish():
                frames.append(_more(key, said))
            del self._deltas[key]
        return frames

    def _note(self, kind: str, payload: Json) -> None:
        if kind == "message_start":
            self._begun = True
            message = payload.get("message")
            if isinstance(message, dict):
                self._about = {key: message[key] for key in ("id", "model", "usage") if key in message}
        elif kind == "content_block_start":
            self._open[_index(payload)] = None
        elif kind == "content_block_stop":
            self._open.pop(_index(payload), None)
        elif kind == "message_delta" and isinstance(payload.get("usage"), dict):
            self._usage = payload["usage"]
        self.ended = kind in ("message_stop", "error")


_ENDS = frozenset(["content_block_stop", "message_delta", "message_stop", "error"])


def _event(kind: str, **fields: Any) -> Frame:
    return Frame({"type": kind, **fields}, None, kind)


def _more(key: _Key, said: Json) -> Frame:
    """One more delta of a block."""
    return _event("content_block_delta", index=key[0], delta={"type": key[1], **said})


def _key(payload: Json) -> _Key:
    delta = payload.get("delta")
    if not isinstance(delta, dict) or not isinstance(delta.get("type"), str):
        raise UpstreamFailed("a delta of the predictor's stream is no object with a type", code=UNSUPPORTED)
    return _index(payload), delta["type"]


def _index(payload: Json) -> int:
    index = payload.get("index", 0)
    if type(index) is not int:
        raise UpstreamFailed("a content block of the predictor's stream has no number for its index", code=UNSUPPORTED)
    return index
