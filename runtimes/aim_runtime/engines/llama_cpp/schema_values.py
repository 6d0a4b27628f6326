"""A schema's keywords that hold values, not schemas: read, bounded, and put into what is compiled.

One ``SchemaValues`` reads one schema: the bounds on its ``enum`` and ``const`` count all of them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aim_runtime.engines.base import Json

from .pattern import PatternRefused, is_writable, translated
from .schema_number import BOUNDS, DIGITS, Steps, is_exact, read_bound
from .text_format import ENFORCED_FORMATS, FORMAT_PATTERNS
from .unenforceable import Unenforceable, shown

#: JSON levels of one schema as written; the library reads 128, two for each level.
MAX_NESTING = 50
MAX_PROPERTIES = 500  # of one object: each optional one is a state that must be followed at once
MAX_COUNT = 10_000  # of minLength, maxLength, minItems, maxItems, minProperties, maxProperties
MAX_LITERALS = 5_000  # values in all of "enum" and "const"
MAX_LITERAL_CHARACTERS = 200_000
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


class SchemaValues:
    """Args:
    strict: refuse formats that are not enforced.
    """

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._literals = 0
        self._literal_characters = 0
        self._steps = Steps()

    def read(self, key: str, value: Any, at: str, out: Json) -> None:
        """Put one of VALUE_KEYWORDS into ``out``.

        Args:
            at: its place, as a client would write it.

        Raises:
            Unenforceable: no such value, or beyond a bound.
        """
        _READERS[key](self, value, at, out)

    def _type(self, value: Any, at: str, out: Json) -> None:
        names = value if isinstance(value, list) else [value]
        if not names or any(name not in _TYPES for name in names) or len(set(names)) < len(names):
            raise Unenforceable(at, f"is {shown(value)}: it is one or several of {', '.join(_TYPES)}")
        out["type"] = value

    def _enum(self, value: Any, at: str, out: Json) -> None:
        if not isinstance(value, list) or not value:
            raise Unenforceable(at, f"is {shown(value)}: it is a list of values, not empty")
        out["enum"] = [self._literal(item, f"{at}[{i}]", 0) for i, item in enumerate(value)]

    def _const(self, value: Any, at: str, out: Json) -> None:
        out["const"] = self._literal(value, at, 0)

    def _literal(self, value: Any, at: str, nesting: int) -> Any:
        """A value that the grammar can spell exactly."""
        self._literals += 1
        if self._literals > MAX_LITERALS:
            raise Unenforceable(at, f"is value number {self._literals}: {MAX_LITERALS} is the most")
        if nesting > MAX_NESTING:
            raise Unenforceable(at, f"is nested too deeply: {MAX_NESTING} levels is the most")
        if isinstance(value, str):
            self._check_text(value, at)
        elif isinstance(value, list):
            return [self._literal(item, f"{at}[{i}]", nesting + 1) for i, item in enumerate(value)]
        elif isinstance(value, dict):
            for key in value:
                self._check_text(key, at)
            return {key: self._literal(item, f"{at}.{key}", nesting + 1) for key, item in value.items()}
        elif not isinstance(value, bool) and isinstance(value, (int, float)) and not is_exact(value):
            raise Unenforceable(at, f"is {value!r}: numbers beyond 2**53 or of over {DIGITS} digits are not generated")
        return value

    def _check_text(self, text: str, at: str) -> None:
        self._literal_characters += len(text)
        if self._literal_characters > MAX_LITERAL_CHARACTERS:
            raise Unenforceable(at, f"brings the values to over {MAX_LITERAL_CHARACTERS} characters")
        if not is_writable(text):
            raise Unenforceable(at, f"is {shown(text)}: control characters without a short escape are not generated")

    def _count(self, value: Any, at: str, out: Json) -> None:
        count = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_COUNT:
            raise Unenforceable(at, f"is {shown(value)}: it may be 0 to {MAX_COUNT}")
        out[at.rpartition(".")[2]] = count

    def _bound(self, value: Any, at: str, out: Json) -> None:
        read_bound(value, at, out)

    def _step(self, value: Any, at: str, out: Json) -> None:
        out["multipleOf"] = self._steps.read(value, at)

    def _required(self, value: Any, at: str, out: Json) -> None:
        if not isinstance(value, list) or any(not isinstance(name, str) for name in value):
            raise Unenforceable(at, f"is {shown(value)}: it is a list of names")
        if len(value) > MAX_PROPERTIES:
            raise Unenforceable(at, f"has {len(value)} names: {MAX_PROPERTIES} is the most")
        out["required"] = value

    def _unique(self, value: Any, at: str, out: Json) -> None:
        if value is not False:
            raise Unenforceable(at, "cannot be enforced by this engine: drop it")

    def _pattern(self, value: Any, at: str, out: Json) -> None:
        out["pattern"] = translated_at(value, at)

    def _format(self, value: Any, at: str, out: Json) -> None:
        if not isinstance(value, str):
            raise Unenforceable(at, f"is {shown(value)}: it is a name")
        if value in FORMAT_PATTERNS:  # beside "pattern", which may follow
            out.setdefault("allOf", []).append({"pattern": FORMAT_PATTERNS[value]})
        elif value in ENFORCED_FORMATS:
            out["format"] = value
        elif self._strict:
            raise Unenforceable(at, f"is {value!r}, which cannot be enforced by this engine: drop it, or 'strict'")


_READERS: dict[str, Callable[[SchemaValues, Any, str, Json], None]] = {
    "type": SchemaValues._type,
    "enum": SchemaValues._enum,
    "const": SchemaValues._const,
    "multipleOf": SchemaValues._step,
    "required": SchemaValues._required,
    "uniqueItems": SchemaValues._unique,
    "pattern": SchemaValues._pattern,
    "format": SchemaValues._format,
    **dict.fromkeys(_COUNTS, SchemaValues._count),
    **dict.fromkeys(BOUNDS, SchemaValues._bound),
}
VALUE_KEYWORDS = frozenset(_READERS)


def translated_at(pattern: Any, at: str) -> str:
    """A regular expression for the library. Raises Unenforceable."""
    if not isinstance(pattern, str):
        raise Unenforceable(at, f"is {shown(pattern)}: it is a regular expression")
    try:
        return translated(pattern)
    except PatternRefused as error:
        raise Unenforceable(at, f"{error}: it cannot be enforced") from error
