"""What a choice says, piece by piece: an accumulator for every path that a text of its deltas has."""

from __future__ import annotations

from typing import Any

from aim_guardrail.exact_json import paired
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.protocols.places import WHOLE
from aim_guardrail.slots.collect import is_no_text
from aim_guardrail.slots.places import Kind, Place
from aim_guardrail.slots.slot import Json
from aim_guardrail.streams.calls import Calls
from aim_guardrail.streams.text import UNSUPPORTED, StreamText
from aim_kserve.errors import UpstreamFailed

Key = tuple[Any, ...]
"""What tells an accumulator: keys, and of lists what tells their items apart."""
Way = tuple[str | Json, ...]
"""How its text is put into a delta: keys, and of lists the fields that tell their items."""


_MAX_DEPTH = 200
_MOST_TEXTS = 512

#: What tells items of a list apart, and comes whole with each piece.
_TELLING = ("type", "index", "id")


#: What became of a piece: sent as it came, sent changed, nothing left to send.
SAME, CHANGED, HELD = 0, 1, 2


class _Held:
    """Pieces of JSON, checked as one when they are complete."""

    __slots__ = ("chars", "pieces", "way")

    def __init__(self, way: Way) -> None:
        self.pieces: list[str] = []
        self.chars = 0
        self.way = way

    def push(self, piece: str) -> None:
        self.pieces.append(piece)
        self.chars += len(piece)


class Delta:
    """``take`` deltas, which are checked in place; ``finish``, then ``close``.

    Args:
        place: what a delta is.

    Attributes:
        earlier: what must be said before the delta just taken: the rest of texts that it is not about any more.
    """

    def __init__(self, screening: Screening, metrics: Metrics, place: Place) -> None:
        self._screening = screening
        self._metrics = metrics
        self._place = place
        self._texts: dict[Key, tuple[StreamText, Way]] = {}
        self._json: dict[Key, _Held] = {}
        self._calls = Calls()
        self._current: dict[str, Key] = {}  # of fields whose parts follow each other: the one that goes on
        self.earlier: list[Json] = []

    @property
    def held_chars(self) -> int:
        """How much is held back now."""
        held = sum(held.chars for held in self._json.values()) if self._json else 0
        for text, _ in self._texts.values():
            held += text.held_chars
        return held

    def take(self, delta: Json) -> int:
        """Check a delta in place. Raises Blocked, DetectorFailed, ServingError."""
        if self.earlier:
            self.earlier = []
        return self._object(delta, self._place, (), ())

    def finish(self) -> Json:
        """All that was held, as one more delta."""
        delta: Json = {}
        for text, way in self._texts.values():
            _put(delta, way, text.finish())
        for held in self._json.values():
            _put(delta, held.way, self._screening.json_text("answer", paired("".join(held.pieces))))
        self._texts.clear()
        self._json.clear()
        return delta

    def last_words(self) -> Json:
        """What may still be said when a text was blocked, as one more delta."""
        delta: Json = {}
        for text, way in self._texts.values():
            _put(delta, way, text.last_words)
        return delta

    def close(self) -> None:
        """Count what its texts came to."""
        for text, _ in self._texts.values():
            text.close()

    def _object(self, node: Json, place: Place, key: Key, way: Way, *, is_part: bool = False) -> int:
        if len(way) > _MAX_DEPTH:
            raise _too_deep()
        outcome, known, others = SAME, place.children, place.others
        for name, value in node.items():
            kind = type(value)
            if not value or (kind is not str and kind is not dict and kind is not list):
                continue
            child = known.get(name, others)
            told = key if is_part and name == "text" else (*key, name)
            if kind is str:
                became = self._string(node, name, value, child, told, (*way, name))
            elif child is WHOLE or child.kind is Kind.JSON:
                became = self._whole(node, name, child)
            elif kind is dict:
                became = self._object(value, child, told, (*way, name))
            else:
                became = self._list(value, child, told, (*way, name))
            if became > outcome:
                outcome = became
        return outcome

    def _list(self, node: list[Any], place: Place, key: Key, way: Way) -> int:
        if len(way) > _MAX_DEPTH:
            raise _too_deep()
        outcome, met = SAME, dict[tuple[str, Any], int]()
        for at, item in enumerate(node):
            became = SAME
            if type(item) is str and item:
                became = self._string(node, at, item, place, key if place.parts else (*key, at), (*way, {}))
            elif type(item) is list:
                became = self._list(item, place, (*key, at), (*way, {}))
            elif type(item) is dict:
                became = self._item(item, place, key, way, met)
            outcome = max(outcome, became)
        return outcome

    def _item(self, item: Json, place: Place, key: Key, way: Way, met: dict[tuple[str, Any], int]) -> int:
        """An item of a list: a tool call by its number, what has an index or an id by that, parts of one text as that
        text, others by their type.
        """
        if key == ("tool_calls",):
            return self._call(item, place, key, way)
        told = {name: item[name] for name in _TELLING if type(item.get(name)) in (str, int)}
        teller = next((name for name in ("index", "id") if name in told), "type")
        if place.parts and teller == "type":
            return self._object(item, place, key, (*way, told), is_part=True)
        identity = teller, told.get(teller)
        met[identity] = met.get(identity, -1) + 1
        return self._object(item, place, (*key, identity, met[identity]), (*way, told))

    def _call(self, call: Json, place: Place, key: Key, way: Way) -> int:
        number = self._calls.number(call)
        moved = call.get("index") != number
        call["index"] = number
        outcome = self._object(call, place, (*key, number), (*way, {"index": number}))
        return max(outcome, CHANGED) if moved else outcome

    def _whole(self, node: Json, name: str, place: Place) -> int:
        """What is no piece of anything: checked as it stands."""
        box = {name: node[name]}
        if not self._screening.body("answer", box, place.under(name)):
            return SAME
        node[name] = box[name]
        return CHANGED

    def _string(self, holder: Any, name: str | int, value: str, place: Place, key: Key, way: Way) -> int:
        kind = place.kind
        if kind is Kind.JSON:
            held = self._json.get(key)
            if held is None:
                held = self._json[key] = _Held(way)
                self._bound()
            held.push(value)
            holder[name] = ""
            return HELD
        if kind is Kind.TEXT and place is not WHOLE:
            shown = self._push(key, way, value)
        elif is_no_text(kind, value):
            return SAME
        elif kind is Kind.FREE and name not in _TELLING:
            shown = self._push(key, way, value)
        else:
            shown = self._screening.text("answer", value)
        if shown == value:
            return SAME
        holder[name] = shown
        return CHANGED if shown else HELD

    def _push(self, key: Key, way: Way, value: str) -> str:
        if self._current.get(key[0], key) != key:
            self._turn(key)
        known = self._texts.get(key)
        if known is None:
            if self._place.get(key[0]).parts:
                self._current[key[0]] = key
            known = self._texts[key] = StreamText(self._screening, self._metrics), way
            self._bound()
        elif known[1] != way:
            known = self._texts[key] = known[0], way
        return known[0].push(value)

    def _bound(self) -> None:
        """Raises UpstreamFailed: more texts are open than any answer has; each costs something with every piece."""
        if len(self._texts) + len(self._json) > _MOST_TEXTS:
            raise UpstreamFailed(
                f"a choice of the predictor's stream holds more than {_MOST_TEXTS} texts at once", code=UNSUPPORTED
            )

    def _turn(self, key: Key) -> None:
        """Parts follow each other: when the next begins, the one before is complete, and its rest goes before it."""
        before = self._current[key[0]]
        self._current[key[0]] = key
        if before in self._texts:
            text, way = self._texts[before]
            delta: Json = {}
            _put(delta, way, text.finish())
            del self._texts[before]
            if delta:
                self.earlier.append(delta)


def _too_deep() -> UpstreamFailed:
    problem = f"the predictor's stream is nested deeper than {_MAX_DEPTH} levels: it cannot be checked"
    return UpstreamFailed(problem, code="predictor_invalid")


def _put(delta: Json, way: Way, text: str) -> None:
    """Put a text into a delta, behind what stands there."""
    if not text:
        return
    node: Any = delta
    for step, following in zip(way, (*way[1:], None), strict=True):
        new: Any = text if following is None else [] if isinstance(following, dict) else {}
        if isinstance(step, dict):
            last = node[-1] if node and following is not None else None
            if not isinstance(last, dict) or not step.items() <= last.items():
                last = new if following is None else {**step, **new}
                node.append(last)
            node = last
        elif following is None:
            node[step] = node.get(step, "") + text
        else:
            node = node.setdefault(step, new)
