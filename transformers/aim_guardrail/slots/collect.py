"""Collect: every text of a JSON body as a slot. Pure; nothing is judged or changed here.

**Fail closed**: a body is not searched for the fields known to hold text; every string in it is a slot but those that
stand where the protocol has none (ids, words of its own, pictures), and every key that is more than a plain word.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from aim_guardrail.exact_json import exact
from aim_guardrail.policy import Direction
from aim_guardrail.slots.pictures import picture
from aim_guardrail.slots.places import (
    EMBEDDINGS,
    FREE,
    LABELLED,
    LABELS,
    TOKENS,
    Kind,
    Place,
    is_plain_key,
)
from aim_guardrail.slots.slot import Inner, Json, Slot, Slots, spelt
from aim_kserve.errors import BadRequest, ServingError, UpstreamFailed

_LEAST_NUMBER, _MOST_NUMBER = 10**6, 10**20
_MAX_DEPTH = 200
_NUMBERS = frozenset([float, int])


def collect(direction: Direction, body: Json, place: Place) -> Slots:
    """The slots of ``body``, whose root is ``place``.

    Raises:
        BadRequest: a prompt that cannot be checked (token ids, embeddings), or nested deeper than 200 levels.
        UpstreamFailed: an answer nested deeper than that.
    """
    collector = _Collector(direction)
    collector.object(body, place, "")
    collector.slots.keys = collector.keys
    return collector.slots


def collect_json(direction: Direction, text: str) -> Slots:
    """The slots of a string that is JSON itself, under the key "" of a body. Raises as :func:`collect`."""
    collector = _Collector(direction)
    collector.whole(text)
    return collector.slots


class _Collector:
    """Walks one body. `keys`: how many were met in the document (the body, or a string in it) that is walked now."""

    __slots__ = ("_direction", "_in_json", "_path", "keys", "slots")

    def __init__(self, direction: Direction) -> None:
        self.slots = Slots()
        self.keys = 0
        self._direction: Direction = direction
        self._path: list[str | int] = []
        self._in_json = False  # within what a tool is called with

    def object(self, node: Json, place: Place, role: str) -> int:
        """Walk an object; the index of the slot that is its own `text`, -1 where there is none."""
        path, items = self._path, self.slots.items
        if len(path) > _MAX_DEPTH:
            raise _too_deep(self._direction)
        self.keys += len(node)
        self._names(node, role)
        said = node.get("role")
        role = said if type(said) is str else role if place.is_free else _speaker(node, role)
        label = _label(node) if place.is_free else ""
        children, others, at = place.children, place.others, -1
        path.append("")
        for name, value in node.items():
            kind = type(value)
            if kind is str:
                if value:
                    path[-1] = name
                    child = children.get(name, others)
                    if name == "text":
                        at = len(items)
                    self.string(value, child, (label and name in LABELLED and label) or name, role)
            elif kind is dict or kind is list:
                path[-1] = name
                self._nested(name, value, children.get(name, others), label, role)
            elif self._in_json and kind in _NUMBERS:
                path[-1] = name
                self._number(value, name, role)
        path.pop()
        if self._direction == "prompt" and not self._in_json:
            self._refuse_embeddings(node)
        return at if 0 <= at < len(items) and items[at].path[len(path) :] == ("text",) else -1

    def whole(self, text: str) -> None:
        """A body that is a string which is JSON, in a box."""
        self._path.append("")
        self._json(text, "")

    def string(self, value: str, place: Place, key: str, role: str) -> None:
        kind = place.kind
        if kind is Kind.TEXT:
            self.slots.items.append(Slot(value, tuple(self._path), "", role))
            return
        if kind is Kind.JSON:
            self._json(value, role)
            return
        if place.pictured and (seen := picture(kind, self._path, value)) is not None:
            self.slots.pictures.append(Slot(value, tuple(self._path), "", role, seen))
        if not place.is_no_text(value):
            self.slots.items.append(Slot(value, tuple(self._path), key if place.is_free else "", role))

    def _names(self, node: Json, role: str) -> None:
        """Keys that are more than a plain word: they say something, too."""
        if not all(map(is_plain_key, node)):
            path = tuple(self._path)
            names = (name for name in node if not is_plain_key(name) and name)
            self.slots.items += [Slot(name, (*path, name), "", role, "name") for name in names]

    def _nested(self, name: str, value: Any, place: Place, label: str, role: str) -> None:
        if place.kind is Kind.SHADOW and self._direction == "answer":
            return
        outer, self._in_json = self._in_json, self._in_json or place.kind is Kind.JSON
        if type(value) is dict:
            self.object(value, place, role)
        else:
            if self._direction == "prompt" and name in TOKENS and not self._in_json:
                self._refuse_tokens(value)
            self._list(value, place, label if label and name in LABELLED else name, role)
        self._in_json = outer

    def _list(self, node: list[Any], place: Place, key: str, role: str) -> None:
        path = self._path
        if len(path) > _MAX_DEPTH:
            raise _too_deep(self._direction)
        if not self._in_json and node and type(node[0]) is float and _NUMBERS.issuperset(map(type, node)):
            return  # an embedding, as long as a book has words
        items, texts = self.slots.items, list[int]()  # of each element: the slot that is its text, -1 for none
        path.append(0)
        for index, value in enumerate(node):
            kind, at = type(value), -1
            path[-1] = index
            if kind is dict:
                at = self.object(value, place, role)
            elif kind is list:
                self._list(value, place, key, role)
            elif kind is str:
                if value:
                    before = len(items)
                    self.string(value, place, key, role)
                    at = before if len(items) > before else -1
            elif self._in_json and kind in _NUMBERS:
                self._number(value, key, role)
            texts.append(at)
        path.pop()
        if place.parts and len(node) > 1:
            self._join(node, texts)

    def _number(self, value: float, key: str, role: str) -> None:
        """A whole number, however it is written: a card number is one without its quotes."""
        if _LEAST_NUMBER <= abs(value) < _MOST_NUMBER and value == value // 1:
            self.slots.items.append(Slot(str(abs(int(value))), tuple(self._path), key, role, "number"))

    def _json(self, text: str, role: str) -> None:
        """A string that is JSON itself: what it says, its numbers too, however it is escaped.

        Where it is not valid JSON (cut short by a token limit), its escapes are resolved.
        """
        try:
            value = exact(orjson.loads(text), text)
        except orjson.JSONDecodeError:
            self.slots.items.append(Slot(unescaped(text), tuple(self._path), "", role))
            return
        inner = self.slots.inner[tuple(self._path)] = Inner(text, {"": value})
        outer = self.keys, self._in_json
        self.keys, self._in_json = -1, True  # the box has a key of its own
        self.object(inner.box, FREE, role)
        inner.keys = self.keys
        self.keys, self._in_json = outer

    def _join(self, parts: list[Any], texts: list[int]) -> None:
        """Note which of the texts just collected are neighbours: parts between which nothing else stands."""
        run: list[int] = []
        for part, at in zip(parts, texts, strict=True):
            if at >= 0:
                run.append(at)
            elif not _says_nothing(part):
                self._note(run)
                run = []
        self._note(run)

    def _note(self, run: list[int]) -> None:
        if len(run) > 1:
            self.slots.joined.append(tuple(run))

    def _refuse_tokens(self, value: list[Any]) -> None:
        if any(type(item) is int or (type(item) is list and any(type(x) is int for x in item)) for item in value):
            where = spelt(self._path)
            raise BadRequest(f"{where}: token ids cannot be checked by the guardrail: give text", param=where)

    def _refuse_embeddings(self, node: Json) -> None:
        for field in EMBEDDINGS:
            if node.get(field) is not None:
                raise BadRequest(f"{field}: embeddings cannot be checked by the guardrail: give text", param=field)


#: Who says what stands in an object of a type, where no message says so: not whoever asks.
_SPEAKERS = {
    **dict.fromkeys(["tool_result", "function_call_output", "custom_tool_call_output", "mcp_call"], "tool"),
    **dict.fromkeys(["web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result"], "tool"),
    **dict.fromkeys(["document", "search_result"], "document"),
}


def _speaker(node: Json, role: str) -> str:
    kind = node.get("type")
    return _SPEAKERS.get(kind, role) if type(kind) is str else role


def _label(node: Json) -> str:
    """What an object calls the value in it, "" if it has none or no name."""
    if LABELLED.isdisjoint(node):
        return ""
    return next((node[label] for label in LABELS if type(node.get(label)) is str), "")


def _says_nothing(part: Any) -> bool:
    """Whether a part is a text that is empty: its neighbours are each other's."""
    return part == "" or (type(part) is dict and part.get("text") == "")


def _too_deep(direction: Direction) -> ServingError:
    if direction == "answer":
        return UpstreamFailed(
            f"the predictor's answer is nested deeper than {_MAX_DEPTH} levels: it cannot be checked",
            code="predictor_invalid",
        )
    return BadRequest(f"the JSON is nested deeper than {_MAX_DEPTH} levels: flatten it", code="invalid_json")


def unescaped(text: str) -> str:
    """JSON's escapes in a piece of JSON resolved, whatever else is wrong with it."""
    return _ESCAPE.sub(_plain, text) if "\\" in text else text


_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.?))", re.DOTALL)
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def _plain(escape: re.Match[str]) -> str:
    if escape[1] is None:
        return _ESCAPES.get(escape[2], escape[2])
    code = int(escape[1], 16)
    return chr(code) if not 0xD800 <= code < 0xE000 else "\N{REPLACEMENT CHARACTER}"
