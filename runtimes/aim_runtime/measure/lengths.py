"""How long prompts and answers are: distributions of token counts, drawn from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from aim_runtime.measure.errors import MeasureError

#: More than any context there is: what is longer is a slip of the pen.
MOST_TOKENS = 10_000_000
_MOST_BYTES = 64 * 2**20
FORMS = "constant:N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA or file:PATH (a whole number a line)"


class Lengths(NamedTuple):
    """A distribution as it was asked for, and how a value of it is drawn."""

    text: str
    draw: Callable[[random.Random], int]


def lengths(text: str, field: str) -> Lengths:
    """``constant:128``; ``uniform:32:256``, both ends included; ``lognormal:200:0.8``, the median in tokens and the
    standard deviation of the logarithm; ``file:PATH``, drawn with replacement.

    Raises:
        MeasureError: it is none of these; names the field and the value.
    """
    kind, *parts = text.split(":")
    if kind == "file" and parts:
        return Lengths(text, _of_file(":".join(parts), field))
    if (kind, len(parts)) not in _KINDS:
        raise _wrong(field, text, f"give {FORMS}")
    try:
        return Lengths(text, _KINDS[kind, len(parts)](*map(float, parts)))
    except (ValueError, OverflowError) as error:
        raise _wrong(field, text, str(error)) from None


def _wrong(field: str, text: str, remedy: str) -> MeasureError:
    return MeasureError(f"--{field} {text}: no length in tokens: {remedy}", exit_code=2)


def _whole(value: float) -> int:
    if not 1 <= value <= MOST_TOKENS or value != int(value):
        raise ValueError(f"{value:g} is no whole number from 1 to {MOST_TOKENS:,}")
    return int(value)


def _constant(value: float) -> Callable[[random.Random], int]:
    tokens = _whole(value)
    return lambda _: tokens


def _uniform(low: float, high: float) -> Callable[[random.Random], int]:
    first, last = _whole(low), _whole(high)
    if first > last:
        raise ValueError(f"{first} is more than {last}")
    return lambda source: source.randint(first, last)


def _lognormal(median: float, sigma: float) -> Callable[[random.Random], int]:
    middle = _whole(median)
    if not 0 <= sigma <= 5:
        raise ValueError(f"sigma {sigma:g} is not from 0 to 5")
    return lambda source: min(MOST_TOKENS, max(1, round(middle * source.lognormvariate(0.0, sigma))))


_KINDS: dict[tuple[str, int], Callable[..., Callable[[random.Random], int]]] = {
    ("constant", 1): _constant,
    ("uniform", 2): _uniform,
    ("lognormal", 2): _lognormal,
}


def _of_file(name: str, field: str) -> Callable[[random.Random], int]:
    try:
        with Path(name).open(encoding="utf-8") as opened:
            lines = opened.read(_MOST_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(field, f"file:{name}", getattr(error, "strerror", None) or "not UTF-8") from None
    found: list[int] = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(_whole(float(line)))
        except ValueError as error:
            raise _wrong(field, f"file:{name}", f"line {number}: {error}") from None
    if not found:
        raise _wrong(field, f"file:{name}", "it is empty")
    return lambda source: source.choice(found)
