"""Recorded traces: when requests came, and how many tokens they and their answers had. A line of JSON a request.

Ours is `{"t": 0.5, "prompt_tokens": 90, "output_tokens": 20}`. The names of two public kinds are read too: Mooncake's
(`timestamp` in milliseconds, `input_length`, `output_length`, `hash_ids`) and BurstGPT's columns (`Timestamp` in
seconds, `Request tokens`, `Response tokens`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aim_profile.errors import AimProfileError

MOST_TOKENS = 10_000_000
_MOST_LINE = 2**20

#: Field → how many of them make a second.
_TIMES = {"t": 1.0, "timestamp": 1e-3, "Timestamp": 1.0}
_PROMPT = ("prompt_tokens", "input_length", "Request tokens")
_OUTPUT = ("output_tokens", "output_length", "Response tokens")
_OTHERS = ("prefix", "prefix_tokens", "hash_ids", "Model", "Total tokens", "Log Type", "Session ID", "Elapsed time")
_KNOWN = frozenset((*_TIMES, *_PROMPT, *_OUTPUT, *_OTHERS))


class TracedRequest(NamedTuple):
    """A line of a trace. at_s: by the clock of the trace; fields: all that stands there."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    fields: Mapping[str, Any]


def read_requests(file: Path, error: type[AimProfileError]) -> Iterator[TracedRequest]:
    """The requests as they stand there, one after the other. Raises `error` naming file and line."""
    try:
        with file.open(encoding="utf-8") as opened:
            # No more of a line than a request can have: a file need not have line ends.
            lines = iter(lambda: opened.readline(_MOST_LINE + 1), "")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _numbered(line, f"{file}:{number}", error)
    except (OSError, UnicodeDecodeError) as problem:
        why = f"{file}: {getattr(problem, 'strerror', None) or 'not UTF-8'}"
        raise error(why, field=str(file), remedy="name a file that can be read") from problem


def _numbered(line: str, named: str, error: type[AimProfileError]) -> TracedRequest:
    try:
        return parse_request(line)
    except (ValueError, RecursionError) as problem:
        raise error(f"{named}: {problem}", field="trace", value=line[:80]) from problem


def parse_request(line: str) -> TracedRequest:
    """A line as a request. Raises ValueError naming the field and the value."""
    raw = _mapping(line)
    name = _one(raw, tuple(_TIMES))
    at = raw[name]
    if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at) or at < 0:
        raise ValueError(f"{name}: {at!r:.80} is no time: give a number from 0")
    prompt, output = (_tokens(raw, _one(raw, names)) for names in (_PROMPT, _OUTPUT))
    return TracedRequest(at * _TIMES[name], prompt, output, raw)


def _mapping(line: str) -> Mapping[str, Any]:
    if len(line) > _MOST_LINE:
        raise ValueError(f"longer than {_MOST_LINE} characters")
    try:
        found = json.loads(line)
    except ValueError:
        example = '{"t": 0.5, "prompt_tokens": 90, "output_tokens": 20}'
        raise ValueError(f"not JSON: a line is a request, as in {example}") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, not a mapping")
    if unknown := next((name for name in found if name not in _KNOWN), None):
        raise ValueError(f"{unknown:.80}: unknown field: use t, prompt_tokens, output_tokens, prefix, prefix_tokens")
    return found


def _one(raw: Mapping[str, Any], names: tuple[str, ...]) -> str:
    found = [name for name in names if name in raw]
    if len(found) != 1:
        raise ValueError(f"{' or '.join(names)}: {'missing' if not found else 'more than one given'}")
    return found[0]


def _tokens(raw: Mapping[str, Any], name: str) -> int:
    value = raw[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
        raise ValueError(f"{name}: {value!r:.80} is no number of tokens from 1 to {MOST_TOKENS:,}")
    return value
