"""Chunks of chat and text completions: ``choices[]`` with a ``delta`` or a ``text``.

Every text of a choice that comes in pieces has an accumulator of its own, by its path: content, reasoning, a tool
call's arguments or input, and whatever is new to us. What the protocol sends whole (citations, names, ids) is checked
where it stands. Pieces of JSON are held until they are complete, all other texts but for what is not proven yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.protocols.places import CHAT
from aim_guardrail.slots.apply import drop_shadows
from aim_guardrail.slots.places import SHADOWS, is_id, is_plain_key, is_word
from aim_guardrail.slots.slot import Json
from aim_guardrail.streams.delta import Delta
from aim_guardrail.streams.frame import Frame, Piece, Said, Whole, done
from aim_guardrail.streams.pieces import DeltaPieces
from aim_guardrail.streams.text import UNSUPPORTED, check_whole
from aim_guardrail.streams.walk import CHANGED, HELD, SAME
from aim_kserve.errors import ServingError, UpstreamFailed
from aim_kserve.sse import Event

#: What every chunk has beside its choices: words and numbers that say nothing, where they have the form of such.
_CHUNK_WORDS = {"id": is_id, "object": is_word, "model": is_id, "system_fingerprint": is_id}
_CHUNK_NUMBERS = frozenset(["created", "usage", *SHADOWS])
_CHOICE_FIELDS = frozenset(["index", "delta", "text", "finish_reason", "stop_reason", *SHADOWS])
_CHOICE = CHAT.get("choices")

#: What some servers write where OpenAI writes null (ollama#4357, sglang#3912).
_NO_REASON = frozenset(["", "null", "none"])
#: Each is looked at with every chunk. OpenAI's own limit is 128.
_MOST_CHOICES = 512


class ChatStream:
    """``take`` chunks; a choice's held text goes out in a chunk of its own before the one with its finish_reason."""

    def __init__(self, screening: Screening, metrics: Metrics) -> None:
        self._screening = screening
        self._metrics = metrics
        self._choices: dict[int, _Choice] = {}
        self._last: Json = {}
        self._same: Json = {}  # fields that say nothing, as the last chunk had them

    @property
    def held_chars(self) -> int:
        """How much is held back now, of all choices."""
        return sum(choice.said.held_chars for choice in self._choices.values())

    def take(self, chunk: Json, event: Event) -> list[Frame]:
        """What may be sent now. Raises Blocked (then send ``blocked``), DetectorFailed, ServingError."""
        self._last = chunk
        items = chunk.get("choices") or ()
        before, changed, held = list[Frame](), drop_shadows(chunk), 0
        says_more = self._saying(chunk)
        if says_more:
            changed = check_whole(self._screening, chunk, says_more, CHAT) or changed
        for item in items:
            choice = self._choice(item)
            changed = _drop_unreal_reason(item) or changed
            outcome, earlier = choice.take(item)
            if outcome or earlier:
                changed = True
            if item.get("finish_reason") is not None:
                earlier = [*earlier, *choice.end(item)]
            for said in earlier:
                before.append(self._frame([said]))
                changed = True
            held += outcome == HELD
        if held and held == len(items) and not says_more and not chunk.get("usage"):
            return before
        return [*before, Frame(chunk, None if changed else event.raw)]

    def flush(self) -> list[Frame]:
        """The stream ends: what was held of choices without a finish_reason. Raises as ``take``."""
        open_choices = [choice for choice in self._choices.values() if not choice.finished]
        return [*(self._frame([said]) for choice in open_choices for said in choice.flush()), done()]

    def blocked(self, *, last_words: bool = True) -> list[Frame]:
        """How a block ends the stream: ``finish_reason: content_filter`` for every open choice, ``[DONE]``.

        Args:
            last_words: say what stood before what was blocked.
        """
        refused = [choice.refused(last_words) for choice in self._choices.values() if not choice.finished]
        return [self._frame(refused), done()]

    def failure(self, error: ServingError) -> list[Frame]:
        return [Frame(error.body()), done()]

    def withdraw(self, frames: Sequence[Frame] | None) -> None:
        """These frames are not sent after all: the choices that they end are open."""
        for frame in frames or ():
            for item in frame.payload.get("choices") or ():
                if item.get("finish_reason") is not None:
                    self._choice(item).finished = False

    def close(self) -> None:
        for choice in self._choices.values():
            choice.said.close()

    def read(self, frame: Frame) -> Said:
        """What a frame says."""
        said = Said()
        chunk = frame.payload
        said.wholes += [Whole(chunk, name, CHAT.get(name)) for name in self._saying(chunk)]
        for item in chunk.get("choices") or ():
            self._choice(item).read(item, said)
        return said

    def _saying(self, chunk: Json) -> list[str]:
        """The fields beside its choices that may say something."""
        same, names = self._same, list[str]()
        for name, value in chunk.items():
            if name == "choices" or value == same.get(name):
                continue
            if _says_nothing(name, value):
                same[name] = value
            else:
                names.append(name)
        return names

    def _choice(self, item: Any) -> _Choice:
        index = item.get("index", 0) if isinstance(item, dict) else None
        if type(index) is not int:
            raise UpstreamFailed("a choice of the predictor's stream is not an object with an index")
        choice = self._choices.get(index)
        if choice is None:
            if len(self._choices) >= _MOST_CHOICES:
                raise UpstreamFailed(
                    f"the predictor's stream has more than {_MOST_CHOICES} choices: ask for fewer", code=UNSUPPORTED
                )
            choice = self._choices[index] = _Choice(index, self._screening, self._metrics)
        return choice

    def _frame(self, choices: list[Json]) -> Frame:
        frame = {key: value for key, value in self._last.items() if key != "usage"}
        return Frame({**frame, "choices": choices})


class _Choice:
    """One choice: ``said`` is what it has said so far, in a delta or as its text."""

    __slots__ = ("_is_chat", "_pieces", "_screening", "finished", "index", "said")

    def __init__(self, index: int, screening: Screening, metrics: Metrics) -> None:
        self.index = index
        self.finished = False
        self.said = Delta(screening, metrics, _CHOICE.get("delta"))
        self._pieces: DeltaPieces | None = None
        self._is_chat = True
        self._screening = screening

    def take(self, item: Json) -> tuple[int, Sequence[Json]]:
        """Check one chunk's choice in place: what became of it, and what must be said before it.

        Raises:
            Blocked, DetectorFailed.
            UpstreamFailed: what cannot be checked.
        """
        outcome = CHANGED if drop_shadows(item) else SAME
        if (names := _unusual(item)) and check_whole(self._screening, item, names, _CHOICE):
            outcome = CHANGED
        holder = self._holder(item)
        if not holder:
            return outcome, ()
        if self.finished:
            if any(value for key, value in holder.items() if key != "role"):
                raise UpstreamFailed(
                    "a choice of the predictor's stream goes on after its finish_reason", code=UNSUPPORTED
                )
            return outcome, ()
        said = self.said.take(holder)
        if not self._is_chat and said:
            item["text"] = holder["text"]
        earlier = [self._item(delta, None) for delta in self.said.earlier] if self.said.earlier else ()
        if said == HELD and (item.get("finish_reason") or (self._is_chat and says_something(holder))):
            said = CHANGED
        return max(outcome, said), earlier

    def _holder(self, item: Json) -> Json:
        """What a chunk says of a choice: its delta, or its text as one. Raises UpstreamFailed."""
        delta = item.get("delta")
        if item.get("message") is not None:  # checked alone in each chunk, a value over two would be seen in neither
            raise UpstreamFailed("a choice of the predictor's stream has a message, not its delta", code=UNSUPPORTED)
        if delta is None:
            self._is_chat = self._is_chat and item.get("text") is None
            text = None if self._is_chat else item.get("text")
            return {"text": text} if text else {}
        self._is_chat = True
        if not isinstance(delta, dict) or item.get("text"):
            raise UpstreamFailed("a choice's delta is no object, or not its only text", code=UNSUPPORTED)
        return delta

    def end(self, item: Json) -> Iterator[Json]:
        """The chunk ``item`` ends the choice: what it says itself, then what was held, as choices before it."""
        place = "delta" if self._is_chat else "text"
        own = item.get(place)
        rest = list(self.flush())
        if rest and own and (not self._is_chat or says_something(own)):
            yield self._item(own if self._is_chat else {"text": own}, None)
            item[place] = type(own)()
        yield from rest

    def flush(self) -> Iterator[Json]:
        """What was still held, as a choice of one more chunk."""
        self.finished = True
        if delta := self.said.finish():
            yield self._item(delta, None)

    def refused(self, last_words: bool) -> Json:
        """The choice as a block ends it."""
        delta = self.said.last_words() if last_words else {}
        if not self._is_chat:
            delta.setdefault("text", "")
        return self._item(delta, "content_filter")

    def read(self, item: Json, said: Said) -> None:
        """Add what a checked choice says to ``said``."""
        said.wholes += [Whole(item, name, _CHOICE.get(name)) for name in _unusual(item)]
        if item.get("text"):
            said.pieces.append(Piece((self.index, "text"), item, "text", item["text"]))
        elif item.get("delta"):
            if self._pieces is None:
                self._pieces = DeltaPieces(_CHOICE.get("delta"), self.index)
            self._pieces.read(item["delta"], said)
        if item.get("finish_reason") is not None:
            said.ends.append(self.index)

    def _item(self, delta: Json, finish_reason: str | None) -> Json:
        content = {"delta": delta} if self._is_chat else delta
        return {"index": self.index, **content, "logprobs": None, "finish_reason": finish_reason}


def says_something(said: Any) -> bool:
    """Whether more than emptied texts, and where they stood, is left."""
    if isinstance(said, dict):
        return any(says_something(value) for key, value in said.items() if key not in ("index", "type"))
    if isinstance(said, list):
        return any(map(says_something, said))
    return said is not None and said != ""


def _drop_unreal_reason(item: Json) -> bool:
    """Null a finish_reason that is none; True if it was one of those. It would end the choice, here and at the client:
    each chunk would be judged alone."""
    reason = item.get("finish_reason")
    if reason is None or (isinstance(reason, str) and reason.strip().lower() not in _NO_REASON):
        return False
    item["finish_reason"] = None
    return True


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a field is one that every chunk has, and of its form."""
    if name in _CHUNK_WORDS:
        return type(value) is str and _CHUNK_WORDS[name](value) is not None
    return name in _CHUNK_NUMBERS and (_is_number(value) or (type(value) is dict and _counts(value)))


def _counts(usage: Json) -> bool:
    """Whether there is nothing but numbers in it, and in what it holds."""
    counted = [usage, *(value for value in usage.values() if type(value) is dict)]
    numbers = all(
        _is_number(value) or (held is usage and type(value) is dict) for held in counted for value in held.values()
    )
    return numbers and all(is_plain_key(name) for held in counted for name in held)


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _unusual(item: Json) -> list[str]:
    """The fields of a choice that come whole, those that are not of their form among them."""
    names = [] if item.keys() <= _CHOICE_FIELDS else [name for name in item if name not in _CHOICE_FIELDS]
    reason, stop = item.get("finish_reason"), item.get("stop_reason")
    if reason is not None and (type(reason) is not str or is_word(reason) is None):
        names.append("finish_reason")
    if stop is not None and type(stop) is not int:
        names.append("stop_reason")
    return names
