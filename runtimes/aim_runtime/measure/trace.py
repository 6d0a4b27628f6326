"""A recorded trace: when requests came, how long they and their answers were, and what their prompts had in common.

A line of JSON a request, as `aim_profile.files.trace` reads it; Mooncake's `hash_ids` are blocks of 512 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aim_profile.files.trace import parse_request
from aim_runtime.measure.errors import MeasureError

#: Tokens that one of Mooncake's hash ids stands for (FAST25-release, README: block size 512).
BLOCK_TOKENS = 512
MOST_REQUESTS = 1_000_000


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
            found.append(_request(line))
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


def _request(line: str) -> Recorded:
    read = parse_request(line)
    return Recorded(read.at_s, read.prompt_tokens, read.output_tokens, _blocks(read.fields, read.prompt_tokens))


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
