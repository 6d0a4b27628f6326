"""Which models make way for one that does not fit beside them. Pure over a clock.

Only those of a lower priority, with no request in flight, unused and loaded for at least the cooldown: two models that
want the same device would otherwise push each other out for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


class DoesNotFit(Exception):
    """Refused before anything was started: one line with the shortfall in GiB."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model as eviction sees it. Times are seconds of one monotonic clock."""

    name: str
    rank: int
    in_flight: int
    last_used_s: float
    loaded_s: float


def evictable(loaded: Sequence[Loaded], rank: int, now_s: float, cooldown_s: float) -> list[str]:
    """Names in the order of leaving: the lowest priority first, then who was used longest ago."""
    idle = [
        model
        for model in loaded
        if model.rank < rank and not model.in_flight and max(model.last_used_s, model.loaded_s) <= now_s - cooldown_s
    ]
    return [model.name for model in sorted(idle, key=lambda model: (model.rank, model.last_used_s))]


def room(fits_without: Callable[[frozenset[str]], None], candidates: Sequence[str]) -> list[str]:
    """The first of ``candidates`` that must leave, as few as it takes.

    Args:
        fits_without: raises DoesNotFit unless it fits once those have left.

    Raises:
        DoesNotFit: not even without all of them.
    """
    for count in range(len(candidates) + 1):
        try:
            fits_without(frozenset(candidates[:count]))
        except DoesNotFit:
            if count == len(candidates):
                raise
        else:
            return _needed(fits_without, list(candidates[:count]))
    raise AssertionError  # unreachable


def _needed(fits_without: Callable[[frozenset[str]], None], leaving: list[str]) -> list[str]:
    """Without those whose place does not help: they stand on another device."""
    for name in leaving[:-1]:
        fewer = [other for other in leaving if other != name]
        try:
            fits_without(frozenset(fewer))
        except DoesNotFit:
            continue
        leaving = fewer
    return leaving
