"""Streamed answers, checked: events in, events out that may be shown.

OpenAI's chat and completion chunks (``choices``), the Responses API's events (``response.*``) and Anthropic's Messages
API's (``message_start`` and so on) are told by their shape, not by the route they came on. What is neither is checked
as a whole, and what cannot be checked ends the stream with an error.

Log probabilities and token ids are not streamed through a checked stream (null): they would tell, token by token,
what the text holds back.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress

import orjson

from aim_guardrail.exact_json import read_piece
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import INLINE_CHARS, DetectorFailed
from aim_guardrail.pipeline.blocked import Blocked
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.slots.apply import repeats_a_key
from aim_guardrail.slots.places import FREE
from aim_guardrail.slots.slot import Json
from aim_guardrail.streams.chat import ChatStream
from aim_guardrail.streams.frame import Frame, Said, Whole, done, joined
from aim_guardrail.streams.messages import KINDS, MessagesStream
from aim_guardrail.streams.responses import ResponsesStream
from aim_guardrail.streams.text import UNSUPPORTED
from aim_kserve.errors import ServingError, UpstreamFailed
from aim_kserve.sse import Event

#: A comment: it keeps a connection and says nothing.
HEARTBEAT = b":\n\n"

_FRAME_BYTES = len(b"data: \n\n")
_NAME = re.compile(rb"[a-z_.-]{1,64}")


class StreamScreen:
    """One streamed answer. ``feed`` events, send what it gives; stop when ``ended``; ``close`` in the end.

    Attributes:
        ended: nothing may follow (``[DONE]``, the Responses API's last event, a block, a failure).
        complete: it was the predictor that ended it.
        mode: the policy's. `buffer`: a block is raised; `observe`: events are sent as they come, what it gives are only
            judged.
    """

    def __init__(self, screening: Screening, metrics: Metrics) -> None:
        self.ended = self.complete = False
        self.mode = screening.guard.policy.stream.mode
        self._screening = screening
        self._metrics = metrics
        self._kind: ChatStream | MessagesStream | ResponsesStream | None = None
        if screening.context.route.endswith("/v1/messages"):  # whose errors have a form of their own
            self._kind = MessagesStream(screening, metrics)
        self._spent_s = 0.0
        self._decision: str | None = None

    def is_large(self, event: Event) -> bool:
        """Whether feeding this event may take long: of it, and of what is held and may end with it, much is checked."""
        held = self._kind.held_chars if self._kind is not None else 0
        return len(event.raw) + held > INLINE_CHARS

    def feed(self, event: Event) -> bytes:
        """What may be sent now that ``event`` has come; may be empty.

        Raises:
            ServingError: the stream cannot go on; see :meth:`failure`.
        """
        frames = self.frames(event)
        for frame in frames:
            frame.restore(self._screening.session.vault)
        return joined(frames)

    def frames(self, event: Event) -> list[Frame]:
        """As :meth:`feed`, not yet written. Raises Blocked, where nothing has been shown yet."""
        started = time.perf_counter()
        try:
            return self._take(event)
        except DetectorFailed as error:
            raise self._screening.failed(error) from error
        except Blocked as error:
            if self.mode == "buffer":
                raise
            if self.mode == "observe":
                self.withdraw(None)
            return self.blocked(error, last_words=self.mode == "holdback")
        finally:
            self._spent_s += time.perf_counter() - started

    def said(self, frame: Frame) -> Said:
        """What a frame of :meth:`frames` says."""
        if frame.place is not None:
            return Said([], [Whole(frame.payload, None, frame.place)])
        return self._kind.read(frame) if self._kind is not None else Said()

    def blocked(self, error: Blocked, *, last_words: bool = True) -> list[Frame]:
        """How a block ends the stream; ``last_words``: say what stood before what was blocked."""
        self.ended = True
        return self._kind.blocked(last_words=last_words) if self._kind is not None else _error(error)

    def withdraw(self, frames: Sequence[Frame] | None) -> None:
        """These frames, the last that were given, are not sent after all; None: events were sent as they came."""
        if frames:
            self.ended = self.complete = False
        if self._kind is not None:
            self._kind.withdraw(frames)

    def failure(self, error: ServingError) -> bytes:
        """How a stream that has begun tells ``error`` and ends."""
        self.ended = True
        self._decision = "error"
        self._screening.error = error
        return joined(self._kind.failure(error) if self._kind is not None else _error(error))

    def close(self) -> None:
        """Count what the answer came to."""
        if self._kind is not None:
            self._kind.close()
        self._screening.spent_s["answer"] += self._spent_s
        decision = self._decision or self._screening.actions["answer"]
        self._metrics.checked("answer", self._screening.guard.policy.use_case, decision, self._spent_s)

    def _take(self, event: Event) -> list[Frame]:
        if event.data is None or not event.data.strip():  # a keep-alive: it says nothing
            return [Frame({}, HEARTBEAT)] if event.raw.startswith((b":", b"data:")) else []
        if event.data == b"[DONE]":
            self.ended = self.complete = True
            return self._kind.flush() if self._kind is not None else [done()]
        try:
            payload = read_piece(event.data)
        except ValueError:
            payload = None
        if not isinstance(payload, dict):
            raise UpstreamFailed("the predictor's stream holds what is not a JSON object", code="predictor_invalid")
        self._screening.heard(payload)
        bare = _bare(event)
        frames = self._take_object(payload, bare)
        for frame in frames:
            if frame.raw is bare.raw and _repeats_a_key(bare.data or b"", payload):
                frame.raw = None  # our parser saw the last of the two, the client's may see the first
        return frames

    def _take_object(self, payload: Json, event: Event) -> list[Frame]:
        kind = payload.get("type")
        if isinstance(kind, str) and kind.startswith(("response.", "transcript.")):
            if not isinstance(self._kind, ResponsesStream):
                self._kind = ResponsesStream(self._screening, self._metrics)
            shown = self._kind.take(payload, event)
            self.ended = self.complete = self._kind.ended
            return shown
        if kind in KINDS or (isinstance(self._kind, MessagesStream) and isinstance(kind, str)):
            return self._message(payload, event)
        if type(payload.get("choices")) is list:
            return self._chat().take(payload, event)
        if "error" in payload or payload.get("object") == "error":
            changed = self._screening.body("answer", payload)
            return [Frame(payload, None if changed else event.raw, place=FREE)]
        if payload.get("choices") is None and (isinstance(self._kind, ChatStream) or _is_chunk(payload)):
            return self._chat().take(payload, event)
        raise UpstreamFailed("the predictor's stream is of an unknown kind: it cannot be checked", code=UNSUPPORTED)

    def _message(self, payload: Json, event: Event) -> list[Frame]:
        if not isinstance(self._kind, MessagesStream):
            self._kind = MessagesStream(self._screening, self._metrics)
        shown = self._kind.take(payload, event)
        self.ended = self.complete = self._kind.ended
        return shown

    def _chat(self) -> ChatStream:
        if not isinstance(self._kind, ChatStream):
            self._kind = ChatStream(self._screening, self._metrics)
        return self._kind


def _is_chunk(payload: Json) -> bool:
    """Whether an object without choices is a chunk of a chat or a completion."""
    return str(payload.get("object")).startswith(("chat.completion", "text_completion")) or "usage" in payload


def _repeats_a_key(data: bytes, payload: Json) -> bool:
    """Whether ``data``, read as ``payload``, gives a key twice."""
    if b"\\u" not in data:  # every colon is written as it was read, but for those of keys that were dropped
        with suppress(orjson.JSONEncodeError):  # too deep
            return data.count(b":") != orjson.dumps(payload).count(b":")
    return repeats_a_key(data)


def _bare(event: Event) -> Event:
    """An event with nothing but its data, and its name where that is a word: ids and comments are dropped unread."""
    if not event.name and len(event.raw) == len(event.data or b"") + _FRAME_BYTES and event.raw.startswith(b"data: "):
        return event  # what nearly all are: one line
    name = event.name if _NAME.fullmatch(event.name) else b""
    head = b"event: %s\n" % name if name else b""
    data = event.data or b""
    if event.raw.startswith(head + b"data:") and event.raw.count(b"\n") == 2 + bool(name):
        return event
    lines = b"".join(b"data: %s\n" % line for line in data.split(b"\n"))
    return Event(head + lines + b"\n", data, name)


def _error(error: ServingError) -> list[Frame]:
    return [Frame(error.body()), done()]
