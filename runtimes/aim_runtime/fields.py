"""Which fields of a body an operation knows, read off its request model, and what becomes of the others.

OpenAI refuses what it does not know, vLLM ignores it. We ignore it too, but say so: a misspelt ``temprature`` is
answered with the header ``x-ignored-fields`` and counted, and refused with ``--strict_fields``. What asks for another
answer than the one it would get is always refused.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Union

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json

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
_FIELDS_AT_MOST = 500
_NAMED_AT_MOST = 10
_NAME_CHARACTERS = 64


@lru_cache(maxsize=64)
def known_fields(model: Any) -> Mapping[str, FieldInfo] | None:
    """Field name (and alias) → what pydantic knows of it, over all members of a union; None where one is no model."""
    if typing.get_origin(model) is Annotated:
        return known_fields(typing.get_args(model)[0])
    if typing.get_origin(model) in (Union, UnionType):
        members = [known_fields(member) for member in typing.get_args(model)]
        return {name: info for fields in members for name, info in (fields or {}).items()} if all(members) else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return None
    named = dict(model.model_fields)
    return named | {info.alias: info for info in named.values() if info.alias}


@lru_cache(maxsize=1024)
def _adapter(model: Any, name: str) -> TypeAdapter[Any]:
    info = (known_fields(model) or {})[name]
    kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    return TypeAdapter(kind)


def takes(model: Any, name: str, value: Any) -> bool:
    """Whether the field ``name`` of ``model`` takes ``value``, as far as the field alone can tell."""
    try:
        _adapter(model, name).validate_python(value, strict=not isinstance(value, (dict, list)))
    except Exception:  # noqa: BLE001  a request model's own validators raise what they like: all of it means no
        return False
    return True


def ignored_fields(operation: str, body: Json, requests: Mapping[str, Any], *, strict: bool) -> list[str]:
    """The fields of ``body`` that the operation does not know; they are left to be ignored.

    Args:
        requests: every operation's model (``Engine.requests``).
        strict: refuse them instead.

    Raises:
        BadRequest: an unknown field that must not be ignored; names it and the remedy.
    """
    known = known_fields(requests.get(operation))
    if known is None or body.keys() <= known.keys():
        return []
    if len(body) > _FIELDS_AT_MOST:
        raise BadRequest(f"the body has {len(body)} fields: at most {_FIELDS_AT_MOST} are looked at")
    unknown = [name for name in body if name not in known and name not in HARMLESS and _asks(body[name])]
    for name in unknown:
        _refuse_misleading(name, operation, requests)
    if strict and unknown:
        raise BadRequest(_strictly(unknown[0], known), param=shown(unknown[0]), code="unknown_field")
    return unknown


def _asks(value: Any) -> bool:
    """Null, false and empty values ask for nothing."""
    return value is not None and value is not False and value not in ("", [], {})


def _refuse_misleading(name: str, operation: str, requests: Mapping[str, Any]) -> None:
    if name in MISLEADING:
        raise BadRequest(f"{name}: not a field of this server: {MISLEADING[name]}", param=name, code="unknown_field")
    others = [other for other in requests if other != operation and name in (known_fields(requests[other]) or {})]
    if others:
        raise BadRequest(
            f"{name}: not a field of {operation}; it belongs to {', '.join(sorted(others))}: leave it out",
            param=name,
            code="unknown_field",
        )


def _strictly(name: str, known: Iterable[str]) -> str:
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
    return ", ".join(shown(name) for name in names[:_NAMED_AT_MOST]) + more
