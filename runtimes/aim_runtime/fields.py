"""Which fields of a body an operation knows, read off its request model, and what becomes of the others.

OpenAI refuses what it does not know, vLLM ignores it. We ignore it too, but say so: a misspelt ``temprature`` is
answered with the header ``x-ignored-fields`` and counted, and refused with ``--strict_fields``. What asks for another
answer than the one it would get is always refused.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Union

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from aim_kserve.errors import BadRequest
from aim_kserve.redacted import redacted

Json = dict[str, Any]

#: OpenAI's fields that speak of the account, its records and its bill, never of the answer.
HARMLESS = frozenset(
    {
        "metadata",
        "model",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
_CONSTRAINTS = "constrain the answer by 'response_format' (or, with vLLM, 'structured_outputs')"
#: Other servers' ways to constrain an answer: whoever sends one relies on it.
MISLEADING = {
    **dict.fromkeys(("ebnf", "grammar", "regex"), _CONSTRAINTS),
    **dict.fromkeys(("guided_choice", "guided_grammar", "guided_json", "guided_regex"), _CONSTRAINTS),
    "json_schema": "give it as 'response_format.json_schema.schema'",
}
#: Fields of other servers' that no client has a say in here, and why. They never reach an engine.
DECIDED = {"priority": "who goes first is decided by the class of the caller (header x-qos-priority lowers it)"}
_FIELDS_AT_MOST = 500
_NAMED_AT_MOST = 10
_NAME_CHARACTERS = 64


_NESTED_AT_MOST = 6  # levels of a field's schema that are looked at; below, anything is taken


@dataclass(frozen=True, slots=True)
class Kinds:
    """The kinds of JSON that a field takes, as far as the field alone can tell.

    ``names`` are JSON Schema's (``null``, ``boolean``, ``integer``, ``number``, ``string``, ``object``); ``arrays``
    holds one entry for each kind of array: what its items may be. A number is strict: a string of digits is none.
    """

    names: frozenset[str] = frozenset()
    arrays: tuple[Kinds, ...] = ()
    anything: bool = False

    def take(self, value: Any) -> bool:
        """Whether ``value``, parsed JSON, is of these kinds. Linear in its size."""
        if self.anything:
            return True
        if isinstance(value, list):
            return any(all(map(items.take, value)) for items in self.arrays)
        name = _KIND_OF.get(type(value), "")
        return name in self.names or (name == "integer" and "number" in self.names)


#: What an operation knows of its body: field name (or alias) → what it takes. Plain values: they can be sent to another
#: process, where the request model they were read from cannot be imported.
Fields = Mapping[str, Kinds]

_KIND_OF = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}
_ANYTHING = Kinds(anything=True)


class _Lenient(GenerateJsonSchema):
    """What JSON Schema cannot say may be anything."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012  pydantic's own declaration

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {}


@lru_cache(maxsize=64)
def fields_of(model: Any) -> Fields | None:
    """The fields of a pydantic model, or of a union of models: its members' together; None for what is no model.
    Takes some milliseconds, once."""
    if typing.get_origin(model) is Annotated:
        return fields_of(typing.get_args(model)[0])
    if typing.get_origin(model) in (Union, UnionType):
        members = [fields_of(member) for member in typing.get_args(model)]
        return {name: kinds for fields in members for name, kinds in (fields or {}).items()} if all(members) else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return None
    schema = model.model_json_schema(by_alias=False, schema_generator=_Lenient)
    definitions = schema.get("$defs", {})
    properties = (definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema).get("properties", {})
    named = {name: _kinds(properties.get(name, {}), definitions, 0) for name in model.model_fields}
    return named | {info.alias: named[name] for name, info in model.model_fields.items() if info.alias}


def _kinds(schema: Any, definitions: Mapping[str, Any], level: int) -> Kinds:
    """What a JSON Schema, as pydantic writes them, allows."""
    if not isinstance(schema, dict) or level > _NESTED_AT_MOST:
        return _ANYTHING
    if "$ref" in schema:
        return _kinds(definitions.get(schema["$ref"].rpartition("/")[2]), definitions, level + 1)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return _either([_kinds(member, definitions, level) for member in schema[union]])
    if "enum" in schema or "const" in schema:
        return Kinds(frozenset(_KIND_OF.get(type(value), "") for value in schema.get("enum", [schema.get("const")])))
    kind = schema.get("type")
    if kind == "array":
        return Kinds(arrays=(_kinds(schema.get("items"), definitions, level + 1),))
    return Kinds(frozenset({kind})) if isinstance(kind, str) else _ANYTHING


def _either(members: list[Kinds]) -> Kinds:
    return Kinds(
        frozenset().union(*(member.names for member in members)),
        tuple(dict.fromkeys(kind for member in members for kind in member.arrays)),
        any(member.anything for member in members),
    )


def takes(fields: Fields | None, name: str, value: Any) -> bool:
    """Whether the field ``name`` takes ``value``, as far as the field alone can tell; an unknown field takes none."""
    return name in (fields or {}) and (fields or {})[name].take(value)


def ignored_fields(operation: str, body: Json, requests: Mapping[str, Fields | None], *, strict: bool) -> list[str]:
    """The fields of ``body`` that the operation does not know; they are left to be ignored.

    Args:
        requests: every operation's fields (``Engine.requests``).
        strict: refuse them instead.

    Raises:
        BadRequest: an unknown field that must not be ignored; names it and the remedy.
    """
    known = requests.get(operation)
    if (known is None or body.keys() <= known.keys()) and DECIDED.keys().isdisjoint(body):
        return []
    if len(body) > _FIELDS_AT_MOST:
        raise BadRequest(f"the body has {len(body)} fields: at most {_FIELDS_AT_MOST} are looked at")
    unknown = [name for name in body if _is_unknown(name, known) and _asks(body[name])]
    for name in unknown:
        if name not in DECIDED:
            _refuse_misleading(name, operation, requests)
    if strict and unknown:
        raise BadRequest(_strictly(unknown[0], known or ()), param=shown(unknown[0]), code="unknown_field")
    return unknown


def _is_unknown(name: str, known: Fields | None) -> bool:
    return name in DECIDED or (known is not None and name not in known and name not in HARMLESS)


def _asks(value: Any) -> bool:
    """Null, false and empty values ask for nothing."""
    return value is not None and value is not False and value not in ("", [], {})


def _refuse_misleading(name: str, operation: str, requests: Mapping[str, Fields | None]) -> None:
    if name in MISLEADING:
        raise BadRequest(f"{name}: not a field of this server: {MISLEADING[name]}", param=name, code="unknown_field")
    others = [other for other, fields in requests.items() if other != operation and name in (fields or {})]
    if others:
        raise BadRequest(
            f"{name}: not a field of {operation}; it belongs to {', '.join(sorted(others))}: leave it out",
            param=name,
            code="unknown_field",
        )


def _strictly(name: str, known: Iterable[str]) -> str:
    if name in DECIDED:
        return f"{name}: {DECIDED[name]}; leave it out, or start the server without --strict_fields"
    near = nearest(name, known)
    remedy = f"did you mean {near}?" if near else "leave it out, or start the server without --strict_fields"
    return f"{shown(name)}: unknown field; {remedy}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one most looks like."""
    return next(iter(difflib.get_close_matches(name[:_NAME_CHARACTERS], known, n=1)), None)


def shown(name: str) -> str:
    """A client's own word as one line of ASCII, cut to a bearable length."""
    text = name.encode("unicode_escape").decode("ascii")
    return text if len(text) <= _NAME_CHARACTERS else text[: _NAME_CHARACTERS - 3] + "..."


def header_of(names: list[str]) -> str:
    """The value of ``x-ignored-fields``."""
    more = f", and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return redacted(", ".join(shown(name) for name in names[:_NAMED_AT_MOST])) + more
