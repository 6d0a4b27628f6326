"""A JSON schema becomes the part of JSON Schema that the grammar library keeps exactly, or is refused by place.

What comes out allows no document that the schema does not. It may allow fewer: properties that are not named, integers
beyond 2**53, control characters and numbers a hair from an exclusive bound are not generated. It is small enough that
the library compiles it in about a second at most and steps through it in milliseconds; where the library itself knows
no limit, one stands here.

Read as JSON Schema 2020-12, with draft 7's ``items`` lists. Annotations and unknown keywords say nothing about a
document and are dropped; a keyword that would say something and cannot be enforced is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from urllib.parse import quote, unquote

from aim_runtime.engines.base import Json

from .schema_conjunction import IN_PLACE, Conjunctions, listed
from .schema_number import complete_numbers
from .schema_values import MAX_COUNT, MAX_NESTING, MAX_PROPERTIES, VALUE_KEYWORDS, SchemaValues, translated_at
from .unenforceable import Unenforceable, shown

Schema: TypeAlias = Json | bool

#: Schemas within schemas, followed through references. The library recurses: some 800 end the process.
MAX_DEPTH = 150
MAX_SCHEMAS = 5_000
MAX_PATTERN_PROPERTIES = 10  # of one object: that they exclude each other is proven pair by pair
_CATEGORY = re.compile(r"\\[dDwWsS]")
_REFUSED = frozenset(
    (
        "$dynamicRef",
        "$recursiveRef",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    )
)


def enforceable(schema: Json, *, strict: bool = False) -> Json:
    """The schema to compile. Its ``$defs`` are named after where they stand in ``schema``: ``#/$defs/$defs.Color``.

    Args:
        schema: as the client sent it.
        strict: refuse formats that are not enforced. Otherwise those are annotations, as the standard has them.

    Raises:
        Unenforceable: not a schema, too big, or it asks for what is not enforced; names the place.
    """
    return _Reader(schema, strict).read()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a schema stands.

    Args:
        at: as a client would write it.
        nesting: JSON levels above it.
        open: references it stands in for; meeting one of them again would never end.
        narrow: whether objects and tuples may be closed here. Not where several schemas hold for one value: they
            would exclude each other's properties, or seem to exclude each other as choices of ``oneOf``.
    """

    at: str = ""
    nesting: int = 0
    open: frozenset[str] = frozenset()
    narrow: bool = True

    def within(self, key: str, levels: int = 1) -> _Place:
        """Of a schema for a part of the value."""
        return _Place(self.at + key, self.nesting + levels, narrow=self.narrow)

    def beside(self, key: str, levels: int = 1, *, narrow: bool = True) -> _Place:
        """Of another schema for the same value."""
        return _Place(self.at + key, self.nesting + levels, self.open, self.narrow and narrow)

    def following(self, pointer: str) -> _Place:
        if pointer in self.open:
            raise Unenforceable(self.at, f"is {pointer!r}, which leads back to itself")
        return replace(self, open=self.open | {pointer})


class _Reader:
    """One pass over one schema. Its recursion is the library's: definitions are read where they are first met."""

    def __init__(self, root: Json, strict: bool) -> None:
        self._root = root
        self._definitions: dict[str, Schema] = {}
        self._names: dict[tuple[str, bool], str] = {}
        self._schemas = 0
        self._values = SchemaValues(strict)
        self._depth = 0
        self._conjunctions = Conjunctions(lambda pointer: self._target(pointer, ""))

    def read(self) -> Json:
        body = self._schema(self._root, _Place(open=frozenset({"#"})))
        return {**(body if isinstance(body, dict) else {}), "$defs": self._definitions}

    # -- one schema --------------------------------------------------------------------------------------------

    def _schema(self, node: Any, place: _Place) -> Schema:
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise Unenforceable(place.at, f"is {shown(node)}: a schema is an object, true or false")
        self._schemas += 1
        if self._schemas > MAX_SCHEMAS:
            raise Unenforceable(place.at, f"is schema number {self._schemas}: {MAX_SCHEMAS} is the most")
        if place.nesting > MAX_NESTING or self._depth > MAX_DEPTH:
            raise Unenforceable(
                place.at, f"is nested too deeply: {MAX_NESTING} levels, {MAX_DEPTH} with references, is the most"
            )
        self._depth += 1
        out = self._keywords(node, place)
        self._depth -= 1
        return out

    def _keywords(self, node: Json, place: _Place) -> Json:
        out: Json = {}
        alone = _is_alone(node)
        for key, value in node.items():
            at = f"{place.at}.{key}"
            if key in _REFUSED or (key == "$id" and place.at):
                raise Unenforceable(at, "cannot be enforced by this engine: drop it")
            if key == "$ref":
                out[key] = self._reference(value, place.beside(".$ref", narrow=alone))
            elif key in IN_PLACE:
                out[key] = out.get(key, []) + self._in_place(key, value, place, alone)
            elif key in _PARTS:
                out[key] = _PARTS[key](self, value, place.within(f".{key}") if alone else _frozen(place, key))
            elif key in VALUE_KEYWORDS:
                self._values.read(key, value, at, out)
        closes = place.narrow and alone
        self._check_together(node, place.at, out, closes)
        if closes:
            _close(out)
        return out

    def _in_place(self, key: str, value: Any, place: _Place, alone: bool) -> list[Schema]:
        if not isinstance(value, list) or not value:
            raise Unenforceable(f"{place.at}.{key}", f"is {shown(value)}: it is a list of schemas, not empty")
        narrow = alone and (key == "anyOf" or len(value) == 1)
        read = self._option if key == "oneOf" else self._schema
        return [read(part, place.beside(f".{key}[{i}]", 2, narrow=narrow)) for i, part in enumerate(value)]

    def _option(self, node: Any, place: _Place) -> Schema:
        """A choice of ``oneOf``, references followed: the library must see that the choices exclude each other."""
        while isinstance(node, dict) and "$ref" in node and len(_constraining(node)) == 1:
            node, place = self._target(node["$ref"], place.at), place.following(node["$ref"])
        return self._schema(node, place)

    def _reference(self, pointer: Any, place: _Place) -> str:
        target, place = self._target(pointer, place.at), place.following(pointer)
        name = self._names.get((pointer, place.narrow))
        if name is None:
            name = pointer[2:].replace("/", ".")
            while name in self._definitions:
                name += "'"
            self._names[pointer, place.narrow] = name
            self._definitions[name] = True  # keeps its place while it is read
            self._definitions[name] = self._schema(target, _Place(f".{name}", 2, place.open, place.narrow))
        return f"#/$defs/{quote(name.replace('~', '~0'))}"

    def _target(self, pointer: Any, at: str) -> Any:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise Unenforceable(at, f"is {shown(pointer)}: only references within the schema, '#/...', are followed")
        node: Any = self._root
        for part in unquote(pointer).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and name in map(str, range(len(node))):
                node = node[int(name)]
            elif isinstance(node, dict) and name in node:
                node = node[name]
            else:
                raise Unenforceable(at, f"is {shown(pointer)}, which the schema does not have")
        return node

    # -- keywords that hold schemas ----------------------------------------------------------------------------

    def _list(self, value: Any, place: _Place) -> list[Schema]:
        if not isinstance(value, list) or not value:
            raise Unenforceable(place.at, f"is {shown(value)}: it is a list of schemas, not empty")
        return [self._schema(part, place.within(f"[{i}]")) for i, part in enumerate(value)]

    def _items(self, value: Any, place: _Place) -> Schema | list[Schema]:
        return self._list(value, place) if isinstance(value, list) else self._schema(value, place)

    def _map(self, value: Any, place: _Place) -> dict[str, Schema]:
        if not isinstance(value, dict):
            raise Unenforceable(place.at, f"is {shown(value)}: it is an object of schemas")
        if len(value) > MAX_PROPERTIES:
            raise Unenforceable(place.at, f"has {len(value)} entries: {MAX_PROPERTIES} is the most")
        return {key: self._schema(part, place.within(f".{key}")) for key, part in value.items()}

    def _pattern_map(self, value: Any, place: _Place) -> dict[str, Schema]:
        if isinstance(value, dict) and len(value) > MAX_PATTERN_PROPERTIES:
            raise Unenforceable(place.at, f"has {len(value)} patterns: {MAX_PATTERN_PROPERTIES} is the most")
        parts = self._map(value, place)
        return {translated_at(key, f"{place.at}.{key}"): part for key, part in parts.items()}

    # -- keywords that change each other's meaning ---------------------------------------------------------------

    def _check_together(self, node: Json, at: str, out: Json, closes: bool) -> None:
        _tuple_items(node, at, out)
        _check_open_names(node, at, closes)
        for least, most in (("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties")):
            if out.get(least, 0) > out.get(most, MAX_COUNT):
                raise Unenforceable(f"{at}.{least}", f"is {out[least]} and {most} is {out[most]}: nothing is both")
        if out.get("minProperties", 0) > len(set(out.get("required", ()))) + 1:
            # The grammar does not remember names that the schema leaves open: two may turn out the same.
            raise Unenforceable(f"{at}.minProperties", "cannot be enforced beyond one more than 'required' names")
        complete_numbers(out, at)
        if not _is_alone(node):
            self._conjunctions.check(node, at)


_PARTS: dict[str, Callable[[_Reader, Any, _Place], Any]] = {
    "properties": _Reader._map,
    "patternProperties": _Reader._pattern_map,
    "additionalProperties": _Reader._schema,
    "items": _Reader._items,
    "prefixItems": _Reader._list,
    "additionalItems": _Reader._schema,
}


def _constraining(node: Json) -> set[str]:
    return {key for key in node if key in IN_PLACE or key in _PARTS or key in VALUE_KEYWORDS}


def _is_alone(node: Json) -> bool:
    """Whether no two schemas hold for one value here."""
    places = [key for key in IN_PLACE if key in node]
    if not places:
        return True
    return len(_constraining(node)) == 1 and (places != ["allOf"] or len(listed(node["allOf"])) < 2)


def _frozen(place: _Place, key: str) -> _Place:
    return replace(place.within(f".{key}"), narrow=False)


def _close(out: Json) -> None:
    """Generate what the schema names and nothing else, as vLLM does: small models lose themselves in open objects."""
    named = out.get("properties", {}).keys() >= set(out.get("required", ())) and "minProperties" not in out
    if "patternProperties" in out or ("properties" in out and named):
        out.setdefault("additionalProperties", False)
    if "prefixItems" in out and out.get("minItems", 0) <= len(out["prefixItems"]):
        out.setdefault("items", False)


def _tuple_items(node: Json, at: str, out: Json) -> None:
    """Draft 7's ``items`` list and ``additionalItems`` in the words of 2020-12."""
    rest = out.pop("additionalItems", None)
    if not isinstance(out.get("items"), list):
        return
    if "prefixItems" in node:
        raise Unenforceable(f"{at}.items", "is a list beside 'prefixItems': it is one schema there")
    out["prefixItems"] = out.pop("items")
    if rest is not None:
        out["items"] = rest


def _check_open_names(node: Json, at: str, closes: bool) -> None:
    """Names beside ``patternProperties`` would have to match no pattern, and patterns are not translated exactly."""
    if "patternProperties" not in node:
        return
    if node.get("additionalProperties", not closes) is not False:
        raise Unenforceable(f"{at}.patternProperties", "can be enforced only with 'additionalProperties': false")
    if any(map(_CATEGORY.search, node["patternProperties"])) and not all(map(str.isascii, node.get("properties", ()))):
        raise Unenforceable(f"{at}.patternProperties", "uses \\d, \\w or \\s beside names that are not ASCII")
