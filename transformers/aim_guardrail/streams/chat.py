"""Chunks of chat and text completions: ``choices[]`` with a ``delta`` or a ``text``."""

from __future__ import annotations

from typing import Any

import orjson

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.protocols.places import CHAT
from aim_guardrail.slots.apply import drop_shadows
from aim_guardrail.slots.places import SHADOWS
from aim_guardrail.slots.slot import Json
from aim_guardrail.streams.text import UNSUPPORTED, StreamText
from aim_kserve.errors import ServingError, UpstreamFailed
from aim_kserve.http import DONE
from aim_kserve.sse import Event, sse

_CHUNK_FIELDS = frozenset(["id", "object", "created", "model", "system_fingerprint", "choices", "usage", *SHADOWS])
_CHOICE_FIELDS = frozenset(["index", "delta", "text", "finish_reason", "stop_reason", *SHADOWS])
_CALL_FIELDS = frozenset(["index", "id", "type"])

#: What some servers write where OpenAI writes null (ollama#4357, sglang#3912).
_NO_REASON = frozenset(["", "null", "none"])

#: What became of a piece: sent as it came, sent changed, nothing left to send.
_SAME, _CHANGED, _HELD = 0, 1, 2


class ChatStream:
    """``take`` chunks; a choice's held text goes out in a chunk of its own before the one with its finish_reason."""

    def __init__(self, screening: Screening, metrics: Metrics) -> None:
        self._screening = screening
        self._metrics = metrics
        self._choices: dict[int, _Choice] = {}
        self._last: Json = {}

    @property
    def held_chars(self) -> int:
        """How much is held back now, of all choices."""
        return sum(choice.held_chars for choice in self._choices.values())

    def take(self, chunk: Json, event: Event) -> bytes:
        """What may be sent now. Raises Blocked (then send ``blocked``), DetectorFailed, ServingError."""
        self._last = chunk
        if not chunk.keys() <= _CHUNK_FIELDS:
            _refuse_unless_clean(self._screening, chunk, _CHUNK_FIELDS)
        before, changed, held = b"", drop_shadows(chunk), 0
        for item in chunk["choices"]:
            choice = self._choice(item)
            changed = _drop_unreal_reason(item) or changed
            outcome = choice.take(item)
            changed = changed or outcome != _SAME
            held += outcome == _HELD
            if item.get("finish_reason") is not None and (rest := choice.flush()) is not None:
                before += self._frame([choice.said_before(rest, item)])
                changed = True
        if held and held == len(chunk["choices"]) and not chunk.get("usage"):
            return before
        return before + (sse(orjson.dumps(chunk)) if changed else event.raw)

    def flush(self) -> bytes:
        """The stream ends: what was held of choices without a finish_reason. Raises as ``take``."""
        rests = [choice.flush() for choice in self._choices.values() if not choice.finished]
        return b"".join(self._frame([rest]) for rest in rests if rest is not None)

    def blocked(self) -> bytes:
        """How a block ends the stream: ``finish_reason: content_filter`` for every open choice, ``[DONE]``."""
        return self._frame([choice.refused() for choice in self._choices.values() if not choice.finished]) + DONE

    def failure(self, error: ServingError) -> bytes:
        return sse(orjson.dumps(error.body())) + DONE

    def close(self) -> None:
        for choice in self._choices.values():
            choice.close()

    def _choice(self, item: Any) -> _Choice:
        index = item.get("index", 0) if isinstance(item, dict) else None
        if type(index) is not int:
            raise UpstreamFailed("a choice of the predictor's stream is not an object with an index")
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(index, self._screening, self._metrics)
        return choice

    def _frame(self, choices: list[Json]) -> bytes:
        frame = {key: value for key, value in self._last.items() if key != "usage"}
        return sse(orjson.dumps({**frame, "choices": choices}))


class _Choice:
    __slots__ = ("_call_chars", "_calls", "_is_chat", "_metrics", "_screening", "_texts", "finished", "index")

    def __init__(self, index: int, screening: Screening, metrics: Metrics) -> None:
        self.index = index
        self.finished = False
        self._is_chat = True
        self._screening = screening
        self._metrics = metrics
        self._texts: dict[str, StreamText] = {}
        self._calls: dict[int, list[str]] = {}
        self._call_chars = 0

    @property
    def held_chars(self) -> int:
        return self._call_chars + sum(text.held_chars for text in self._texts.values())

    def take(self, item: Json) -> int:
        """Check one chunk's choice in place."""
        if not item.keys() <= _CHOICE_FIELDS:
            _refuse_unless_clean(self._screening, item, _CHOICE_FIELDS)
        holder = self._holder(item)
        outcome = _CHANGED if drop_shadows(item) else _SAME
        for key, value in list(holder.items()) if self._is_chat else [("text", item.get("text"))]:
            if not value or key == "role":
                continue
            if self.finished:
                raise UpstreamFailed(
                    "a choice of the predictor's stream goes on after its finish_reason", code=UNSUPPORTED
                )
            if isinstance(value, str):
                outcome = max(outcome, self._push(holder, key, value))
            elif key == "tool_calls":
                outcome = max(outcome, self._hold_calls(value))
            elif key == "function_call":
                outcome = max(outcome, self._hold_calls([{"index": -1, "function": value}]))
            else:
                raise UpstreamFailed(f"the streamed field {key!r} cannot be checked", code=UNSUPPORTED)
        if outcome == _HELD and (item.get("finish_reason") or self._says_something(holder)):
            return _CHANGED
        return outcome

    def _holder(self, item: Json) -> Json:
        """What of a choice holds its texts: its delta, or the choice itself. Raises UpstreamFailed."""
        delta = item.get("delta")
        if delta is None:
            self._is_chat = self._is_chat and item.get("text") is None
            return {} if self._is_chat else item
        self._is_chat = True
        if not isinstance(delta, dict) or item.get("text"):
            raise UpstreamFailed("a choice's delta is no object, or not its only text", code=UNSUPPORTED)
        return delta

    def _push(self, holder: Json, key: str, value: str) -> int:
        text = self._texts.get(key)
        if text is None:
            text = self._texts[key] = StreamText(self._screening, self._metrics)
        shown = text.push(value)
        if shown == value:
            return _SAME
        holder[key] = shown
        return _CHANGED if shown else _HELD

    def _hold_calls(self, calls: list[Json]) -> int:
        """Keep the arguments back (they are checked when they are complete), let id, type and name pass, checked."""
        for position, call in enumerate(calls):
            function = call.get("function")
            if isinstance(function, dict) and function.get("arguments"):
                index = call.get("index", position)
                self._calls.setdefault(index, []).append(function["arguments"])
                self._call_chars += len(function["arguments"])
                function["arguments"] = ""
            _refuse_unless_clean(self._screening, call, _CALL_FIELDS)
        return _HELD

    def _says_something(self, holder: Json) -> bool:
        """Whether more than emptied texts is left in a delta."""
        if not self._is_chat:
            return False
        calls = [call.get("function") or call for call in holder.get("tool_calls") or ()]
        if isinstance(holder.get("function_call"), dict):
            calls.append(holder["function_call"])
        named = any(call.get("name") or call.get("id") for call in calls)
        return named or any(value for key, value in holder.items() if key not in ("tool_calls", "function_call"))

    def flush(self) -> Json | None:
        """The choice ends: what was still held, as a choice of one more chunk."""
        rest: Json = {key: text.finish() for key, text in self._texts.items()}
        delta = {key: text for key, text in rest.items() if text}
        calls = {at: self._screening.json_text("answer", "".join(pieces)) for at, pieces in self._calls.items()}
        if -1 in calls:
            delta["function_call"] = {"arguments": calls.pop(-1)}
        if calls:
            delta["tool_calls"] = [{"index": at, "function": {"arguments": text}} for at, text in calls.items()]
        self.finished = True
        self._texts.clear()
        self._calls.clear()
        self._call_chars = 0
        return self._item(delta, None) if delta else None

    def said_before(self, rest: Json, item: Json) -> Json:
        """``rest`` (of ``flush``) with what the chunk ``item`` that ends the choice says itself moved before it."""
        place = "delta" if self._is_chat else "text"
        own = (item.get("delta") or {}) if self._is_chat else {"text": item.get("text")}
        end = rest["delta"] if self._is_chat else rest
        for key, said in own.items():
            held = end.get(key)
            if isinstance(said, dict) and isinstance(held, dict):
                end[key] = {**said, **held}
            else:
                end[key] = said + held if said and held else said or held
        if item.get(place):
            item[place] = type(item[place])()
        return rest

    def refused(self) -> Json:
        """The choice as a block ends it."""
        delta: Json = {key: text.last_words for key, text in self._texts.items() if text.last_words}
        if not self._is_chat:
            delta.setdefault("text", "")
        return self._item(delta, "content_filter")

    def _item(self, delta: Json, finish_reason: str | None) -> Json:
        content = {"delta": delta} if self._is_chat else delta
        return {"index": self.index, **content, "logprobs": None, "finish_reason": finish_reason}

    def close(self) -> None:
        for text in self._texts.values():
            text.close()


def _drop_unreal_reason(item: Json) -> bool:
    """Null a finish_reason that is none; True if it was one of those. It would end the choice, here and at the client:
    each chunk would be judged alone."""
    reason = item.get("finish_reason")
    if reason is None or (isinstance(reason, str) and reason.strip().lower() not in _NO_REASON):
        return False
    item["finish_reason"] = None
    return True


def _refuse_unless_clean(screening: Screening, holder: Json, known: frozenset[str]) -> None:
    """Fields that no kind of chunk is known to have are checked piece by piece, which does not allow redaction."""
    others = {key: value for key, value in holder.items() if key not in known}
    if screening.body("answer", others, CHAT):
        raise UpstreamFailed(f"the policy refuses what the stream says in {', '.join(others)}", code=UNSUPPORTED)
