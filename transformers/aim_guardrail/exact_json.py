"""Integers that survive a body's being written anew. Pure.

orjson makes a float of an integer above 64 bits: an id of 25 digits beside a redacted e-mail address would come out
as another. (A fraction becomes the nearest double, which is what every reader makes of it.)
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import orjson

T = TypeVar("T")

_DIGITS = bytes(ord("0") if byte in b"0123456789" else byte for byte in range(256))
_LONG = b"0" * 19  # digits: the shortest that may exceed 64 bits
_LONG_INTEGER = re.compile(rb"(?<![0-9.])[0-9]{19,}+(?![.eE])")
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_WRITABLE = range(-(2**63), 2**64)  # by orjson


def exact(value: T, source: bytes | str) -> T:
    """``value``, read by orjson from ``source``, so that ``orjson.dumps`` writes every integer as ``source`` has it.

    Those that orjson would change are ``orjson.Fragment`` in it, which no check reads: a card number has 19 digits at
    most. Where there is none (looking costs 1 us per KB), it is ``value`` itself.
    """
    text = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
    if _LONG not in text.translate(_DIGITS) or not _LONG_INTEGER.search(text):
        return value
    try:
        read: T = json.loads(text, parse_int=_integer)
    except RecursionError:  # deeper than any body that is accepted: it will be refused for that
        return value
    return read


def read_piece(source: bytes) -> Any:
    """The JSON of a stream's event, whose strings may end, or begin, within a character: one half of a surrogate pair,
    which orjson refuses.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return exact(orjson.loads(source), source)
    except orjson.JSONDecodeError:
        if not _HALF.search(source):
            raise
    try:
        return json.loads(source, parse_int=_integer, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None


def paired(text: str) -> str:
    """``text`` with surrogate pairs as the characters they are, halves without the other as U+FFFD."""
    if _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def written(value: Any) -> bytes:
    """``value`` as JSON; what is left of halves of characters is U+FFFD in it."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return orjson.dumps(_mended(value))


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return paired(value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    return {paired(key): _mended(item) for key, item in value.items()} if isinstance(value, dict) else value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _integer(digits: str) -> int | orjson.Fragment:
    value = int(digits) if len(digits) <= 20 else None
    return value if value is not None and value in _WRITABLE else orjson.Fragment(digits)
