"""``response_format`` becomes a grammar, or a refusal that names what cannot be enforced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import orjson

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json

from .request import ResponseFormat

if TYPE_CHECKING:
    from .bindings import LlamaModel

_PARAM = "response_format.json_schema.schema"
#: What the converter does not look at. With ``"strict": true`` an answer must not silently break these.
_UNENFORCED = frozenset(
    (
        "not",
        "if",
        "then",
        "else",
        "dependentRequired",
        "dependentSchemas",
        "patternProperties",
        "propertyNames",
        "minProperties",
        "maxProperties",
        "contains",
        "uniqueItems",
        "unevaluatedItems",
        "unevaluatedProperties",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
    )
)
#: Each of these is written out in the grammar. llama.cpp's own limit lies between 1000 and 2000.
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_MAX_COUNT = 1000
_REPEATS = re.compile(r"\{(\d*),?(\d*)\}")
_ANY_OBJECT: Json = {"type": "object"}


def grammar_of(format_: ResponseFormat | None, model: LlamaModel) -> str | None:
    """GBNF for the answer; None when anything goes.

    Raises:
        BadRequest: ``param`` is ``response_format.json_schema.schema``: no schema, not one, or not enforceable.
    """
    if format_ is None or format_.type == "text":
        return None
    if format_.type == "json_object":
        return _grammar(orjson.dumps(_ANY_OBJECT), model)
    if format_.json_schema is None or format_.json_schema.schema_ is None:
        raise BadRequest(f"'{_PARAM}' is required with response_format.type 'json_schema'", param=_PARAM)
    schema = format_.json_schema.schema_
    try:
        text = orjson.dumps(schema)
    except orjson.JSONEncodeError as error:  # more than 254 levels
        raise BadRequest(f"'{_PARAM}' is nested too deeply", param=_PARAM) from error
    _check(schema, strict=bool(format_.json_schema.strict))
    return _grammar(text, model)


@lru_cache(maxsize=64)
def _grammar(schema: bytes, model: LlamaModel) -> str:
    from .bindings import LlamaError, gbnf_of_schema

    try:
        gbnf = gbnf_of_schema(orjson.loads(schema))
        model.new_grammar(gbnf).close()
    except (ValueError, LlamaError) as error:
        raise BadRequest(f"'{_PARAM}' cannot be turned into a grammar: {error}", param=_PARAM) from error
    return gbnf


def _check(schema: Json, *, strict: bool) -> None:
    for key, value, at in _keywords(schema, ""):
        if key in _COUNTS and not (isinstance(value, int) and 0 <= value <= _MAX_COUNT):
            raise BadRequest(f"'{_PARAM}{at}' is {value!r}: it may be 0 to {_MAX_COUNT}", param=_PARAM)
        if key == "pattern" and isinstance(value, str):
            _check_pattern(value, at)
        if strict and key in _UNENFORCED:
            raise BadRequest(f"'{_PARAM}{at}' cannot be enforced by this engine: drop it, or 'strict'", param=_PARAM)


def _check_pattern(pattern: str, at: str) -> None:
    counts = [int(count) for pair in _REPEATS.findall(pattern) for count in pair if count]
    if max(counts, default=0) > _MAX_COUNT:
        raise BadRequest(f"'{_PARAM}{at}' repeats {max(counts)} times: {_MAX_COUNT} is the most", param=_PARAM)


def _keywords(schema: Any, at: str) -> Iterator[tuple[str, Any, str]]:
    """Every keyword of a schema and its parts, with its path. Names of properties are no keywords."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _keywords(item, f"{at}[{index}]")
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        yield key, value, f"{at}.{key}"
        if key in ("properties", "$defs", "definitions") and isinstance(value, dict):
            for name, part in value.items():
                yield from _keywords(part, f"{at}.{key}.{name}")
        elif key not in ("enum", "const", "default", "examples"):
            yield from _keywords(value, f"{at}.{key}")
