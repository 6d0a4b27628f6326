"""A streamed delta walked, each text told by its path: which keys, and of lists what tells their items apart."""

from __future__ import annotations

from typing import Any

from aim_guardrail.protocols.places import WHOLE
from aim_guardrail.slots.places import Kind, Place
from aim_guardrail.slots.slot import Json
from aim_guardrail.streams.calls import Calls
from aim_kserve.errors import UpstreamFailed

Key = tuple[Any, ...]
"""What tells an accumulator: keys, and of lists what tells their items apart."""
Way = tuple[str | Json, ...]
"""How its text is put into a delta: keys, and of lists the fields that tell their items."""

_MAX_DEPTH = 200

#: What tells items of a list apart, and comes whole with each piece.
_TELLING = ("type", "index", "id")


#: What became of a piece: sent as it came, sent changed, nothing left to send.
SAME, CHANGED, HELD = 0, 1, 2


class DeltaWalk:
    """Walks deltas. What is done with a piece of text, with one of JSON, with what comes whole: a subclass says.

    Args:
        place: what a delta is.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._calls = Calls()

    def walk(self, delta: Json) -> int:
        """Walk a delta; the most that became of any of it. Raises UpstreamFailed: it is nested too deep."""
        return self._object(delta, self._place, (), ())

    def text(self, holder: Any, name: Any, value: str, key: Key, way: Way) -> int:
        """A piece of a text, under ``name`` in ``holder``."""
        raise NotImplementedError

    def json(self, holder: Any, name: Any, value: str, key: Key, way: Way) -> int:
        """A piece of a string that is JSON."""
        raise NotImplementedError

    def whole(self, holder: Any, name: Any, place: Place) -> int:
        """What is no piece of anything."""
        raise NotImplementedError

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
                became = self.whole(node, name, child)
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

    def _string(self, holder: Any, name: str | int, value: str, place: Place, key: Key, way: Way) -> int:
        kind = place.kind
        if kind is Kind.JSON:
            return self.json(holder, name, value, key, way)
        if kind is Kind.TEXT and place is not WHOLE:
            return self.text(holder, name, value, key, way)
        if place.is_no_text(value):
            return SAME
        if kind is Kind.FREE and name not in _TELLING:
            return self.text(holder, name, value, key, way)
        return self.whole(holder, name, WHOLE)


def _too_deep() -> UpstreamFailed:
    problem = f"the predictor's stream is nested deeper than {_MAX_DEPTH} levels: it cannot be checked"
    return UpstreamFailed(problem, code="predictor_invalid")
