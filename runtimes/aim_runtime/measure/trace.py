"""A recorded trace: when requests came, how long they and their answers were, and what their prompts had in common.

A line of JSON a request. The names of two public kinds are read too: Mooncake's (`timestamp` in milliseconds,
`input_length`, `output_length`, `hash_ids` of blocks of 512 tokens) and BurstGPT's columns (`Timestamp` in seconds,
`Request tokens`, `Response tokens`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aim_runtime.measure.errors import MeasureError
from aim_runtime.measure.lengths import MOST_TOKENS

#: Tokens that one of Mooncake's hash ids stands for (FAST25-release, README: block size 512).
BLOCK_TOKENS = 512
MOST_REQUESTS = 1_000_000
_MOST_LINE = 2**20

#: Field → its names, and how many of them make a second where it is a time.
_TIMES = {"t": 1.0, "timestamp": 1e-3, "Timestamp": 1.0}
_PROMPT = ("prompt_tokens", "input_length", "Request tokens")
_OUTPUT = ("output_tokens", "output_length", "Response tokens")
_OTHERS = ("prefix", "prefix_tokens", "hash_ids", "Model", "Total tokens", "Log Type", "Session ID", "Elapsed time")
_KNOWN = frozenset((*_TIMES, *_PROMPT, *_OUTPUT, *_OTHERS))


class Recorded(NamedTuple):
    """A request of a trace. at_s: seconds after the first; blocks: what its prompt starts with, each an id and how many
    tokens it stands for, the same in every request that has it."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[tuple[str, int], ...] = ()


def read_trace(file: Path) -> list[Recorded]:
    """Raises MeasureError: it cannot be read, or a line of it is none; names the line and the field."""
    try:
        with file.open(encoding="utf-8") as opened:
            return parse_trace(opened, str(file))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise MeasureError(f"--trace {file}: {reason}", exit_code=2) from None


def parse_trace(lines: Iterable[str], named: str) -> list[Recorded]:
    """The requests in the order of their times, the first at 0. Raises MeasureError."""
    found: list[Recorded] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_request(_mapping(line)))
        except (ValueError, RecursionError) as error:
            raise MeasureError(f"{named}:{number}: {error}", exit_code=2) from None
        if len(found) > MOST_REQUESTS:
            raise MeasureError(f"{named}: more than {MOST_REQUESTS:,} requests: give a part of it", exit_code=2)
    if len(found) < 2:
        raise MeasureError(f"{named}: {len(found)} requests: a trace needs two at least", exit_code=2)
    found.sort(key=lambda each: each.at_s)
    first = found[0].at_s
    if found[-1].at_s == first:
        raise MeasureError(f"{named}: all requests come at once: a trace needs times", exit_code=2)
    return [each._replace(at_s=each.at_s - first) for each in found]


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


def _request(raw: Mapping[str, Any]) -> Recorded:
    time_name = _one(raw, tuple(_TIMES))
    at = raw[time_name]
    if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at) or at < 0:
        raise ValueError(f"{time_name}: {at!r:.80} is no time: give a number from 0")
    prompt = _tokens(raw, _one(raw, _PROMPT))
    return Recorded(at * _TIMES[time_name], prompt, _tokens(raw, _one(raw, _OUTPUT)), _blocks(raw, prompt))


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


def _blocks(raw: Mapping[str, Any], prompt_tokens: int) -> tuple[tuple[str, int], ...]:
    if "hash_ids" in raw:
        ids = raw["hash_ids"]
        if not isinstance(ids, list) or not all(isinstance(each, int | str) for each in ids):
            raise ValueError("hash_ids: not a list of ids")
        return tuple((str(each), BLOCK_TOKENS) for each in ids)
    prefix, tokens = raw.get("prefix"), raw.get("prefix_tokens")
    if prefix is None and tokens is None:
        return ()
    if not isinstance(prefix, int | str) or isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise ValueError("prefix: needs prefix_tokens beside it, how many tokens of the prompt it is")
    if tokens > prompt_tokens:
        raise ValueError(f"prefix_tokens: {tokens} is more than the prompt's {prompt_tokens}")
    return ((str(prefix), tokens),)
