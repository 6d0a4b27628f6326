"""Bounds where several schemas hold for one value: the grammar library has none for what those multiply to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from aim_runtime.engines.base import Json

from .unenforceable import Unenforceable

#: Keywords whose schemas hold for the same value.
IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref")
_PART_KEYS = ("items", "prefixItems", "additionalItems")
#: Different patterns and formats that one string must match at once: the library's time is exponential in them.
MAX_MEETING_PATTERNS = 3
MAX_SEARCHED = 50_000  # schemas and values looked at to find those
#: Choices that hold for one value, times the schemas they are combined with: the library copies those for each.
MAX_COMBINATIONS = 200_000


class Conjunctions:
    """Checks schemas that have been read, and so are well-formed.

    Args:
        target: what a reference stands for.
    """

    def __init__(self, target: Callable[[Any], Any]) -> None:
        self._target = target
        self._searched = 0
        self._counted: dict[int, int] = {}

    def check(self, node: Json, at: str) -> None:
        """Bound the patterns that meet where several schemas hold for one value."""
        sides: list[Any] = [{key: node[key]} for key in ("anyOf", "oneOf", "$ref") if key in node]
        sides += node.get("allOf", [])
        sides.append({key: value for key, value in node.items() if key not in IN_PLACE})
        before = self._searched
        found = [set(self._patterns(side, "", set(), at)) for side in sides]
        choices, size = self._choices(node), self._searched - before
        if choices * size > MAX_COMBINATIONS:
            raise Unenforceable(
                at, f"combines {choices} choices of {size} schemas and values: {MAX_COMBINATIONS} products is the most"
            )
        if sum(map(bool, found)) < 2:
            return
        met: dict[str | None, set[str]] = {}
        for name, text in set().union(*found):
            met.setdefault(name, set()).add(text)
        most = max(len(texts | met.get(None, set())) for texts in met.values())
        if most > MAX_MEETING_PATTERNS:
            raise Unenforceable(
                at, f"brings {most} patterns and formats together in one string: {MAX_MEETING_PATTERNS} is the most"
            )

    def _patterns(self, node: Any, name: str | None, seen: set[Any], at: str) -> Iterator[tuple[str | None, str]]:
        """Patterns and formats in a schema, by the last property on the way to them; None stands for any."""
        if not isinstance(node, dict) or (id(node), name) in seen:
            return
        seen.add((id(node), name))
        self._searched += 1 + len(listed(node.get("enum", [])))
        if self._searched > MAX_SEARCHED:
            raise Unenforceable(at, "holds too many schemas for one value")
        for key, value in node.items():
            if key in ("pattern", "format"):
                yield name, str(value)
            elif key == "patternProperties":
                yield from ((None, pattern) for pattern in value)
            for part, below in self._parts(key, value, name):
                yield from self._patterns(part, below, seen, at)

    def _choices(self, node: Any) -> int:
        """In how many ways ``anyOf`` and ``oneOf`` can be chosen for one value."""
        if not isinstance(node, dict):
            return 1
        if id(node) not in self._counted:
            count = self._choices(self._target(node["$ref"])) if "$ref" in node else 1
            for part in node.get("allOf", ()):
                count *= self._choices(part)
            for key in ("anyOf", "oneOf"):
                count *= sum(map(self._choices, node.get(key, ()))) or 1
            self._counted[id(node)] = min(count, 10**9)
        return self._counted[id(node)]

    def _parts(self, key: str, value: Any, name: str | None) -> Iterator[tuple[Any, str | None]]:
        """Schemas under a keyword, with the name of the property they describe."""
        if key == "$ref":
            yield self._target(value), name
        elif key == "properties":
            yield from ((part, property_) for property_, part in value.items())
        elif key == "patternProperties":
            yield from ((part, None) for part in value.values())
        elif key == "additionalProperties":
            yield value, None
        elif key in _PART_KEYS or key in IN_PLACE:
            yield from ((part, name) for part in listed(value))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
