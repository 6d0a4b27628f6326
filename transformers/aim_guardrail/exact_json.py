"""Integers that survive a body's being written anew. Pure.

orjson makes a float of an integer above 64 bits: an id of 25 digits beside a redacted e-mail address would come out
as another. (A fraction becomes the nearest double, which is what every reader makes of it.)
"""

from __future__ import annotations

import json
import re
from typing import TypeVar

import orjson

T = TypeVar("T")

_DIGITS = bytes(ord("0") if byte in b"0123456789" else byte for byte in range(256))
_LONG = b"0" * 19  # digits: the shortest that may exceed 64 bits
_LONG_INTEGER = re.compile(rb"(?<![0-9.])[0-9]{19,}+(?![.eE])")
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


def _integer(digits: str) -> int | orjson.Fragment:
    value = int(digits) if len(digits) <= 20 else None
    return value if value is not None and value in _WRITABLE else orjson.Fragment(digits)
