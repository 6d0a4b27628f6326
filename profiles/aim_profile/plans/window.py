"""Windows: the hours of each day in which a workload is to run, and the parts of the day at whose edges that changes.

window: "22:00-06:00"      # from and to, on the clock of the file's time_zone (UTC where it names none)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import NamedTuple
from zoneinfo import available_timezones

DAY_MINUTES = 24 * 60
_WRITTEN = re.compile(r"([01][0-9]|2[0-4]):([0-5][0-9])-([01][0-9]|2[0-4]):([0-5][0-9])", re.ASCII)
_AS_IN = 'write from and to as "22:00-06:00"'


class Window(NamedTuple):
    """From `start` to before `end`, minutes since midnight, each less than a day; over midnight where end is less."""

    start: int
    end: int

    def holds(self, minute: int) -> bool:
        """Whether that minute of the day is in it."""
        return (minute - self.start) % DAY_MINUTES < self.minutes

    def covers(self, other: Window) -> bool:
        """Whether all of `other` is in it."""
        after = (other.start - self.start) % DAY_MINUTES
        return self.minutes == DAY_MINUTES or after + other.minutes <= self.minutes

    @property
    def minutes(self) -> int:
        """How long it is: the whole day where both ends are the same."""
        return (self.end - self.start) % DAY_MINUTES or DAY_MINUTES

    def __str__(self) -> str:
        return f"{clock(self.start)}-{clock(self.end)}"


WHOLE_DAY = Window(0, 0)


def clock(minute: int) -> str:
    """`22:00`."""
    return f"{minute // 60:02d}:{minute % 60:02d}"


@lru_cache(maxsize=4096)
def window_of(text: str) -> Window:
    """The window as people write it. Raises ValueError for anything else, the whole day and nothing of it included."""
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise ValueError(f"{text:.40} is no window: {_AS_IN}")
    ends = [60 * int(found[at]) + int(found[at + 1]) for at in (1, 3)]
    if max(ends) > DAY_MINUTES:
        raise ValueError(f"{text} is later than 24:00: {_AS_IN}")
    window = Window(*(end % DAY_MINUTES for end in ends))
    if window.start == window.end:
        raise ValueError(f"{text} is the whole day, or nothing of it: leave window out, or give two times")
    return window


def written(value: object) -> object:
    """What stands in a file, before it is checked: YAML reads `22:00` without quotes as a number."""
    if value is None or isinstance(value, str):
        return value if value is None else str(window_of(value))
    raise ValueError(f"{value} is no window: {_AS_IN}, in quotes")


def minute_of(text: str) -> int:
    """The minute of the day of `23:30`. Raises ValueError."""
    found = re.fullmatch(r"([01][0-9]|2[0-3]):([0-5][0-9])", text, re.ASCII)
    if found is None:
        raise ValueError(f"{text:.40} is no time of day: write it as 23:30")
    return 60 * int(found[1]) + int(found[2])


def known_zone(name: str) -> str:
    """A time zone of the IANA database. Raises ValueError with the nearest; without a database nothing is checked."""
    zones = available_timezones()
    if not zones or name in zones:
        return name
    near = get_close_matches(name[:64], zones, n=1, cutoff=0.6)
    meant = f"did you mean {near[0]}?" if near else "write it as Europe/Berlin"
    raise ValueError(f"no time zone is named {name[:64]!r}: {meant}")


def parts_of_day(windows: Iterable[Window]) -> Sequence[Window]:
    """The day from edge to edge of these windows, in order, the first one the part with midnight in it (or that starts
    there); the whole day where there is none.
    """
    edges = sorted({edge for window in windows for edge in window})
    if not edges:
        return (WHOLE_DAY,)
    starts = edges if edges[0] == 0 else [edges[-1], *edges[:-1]]
    ends = [*starts[1:], starts[0]]
    return [Window(start, end) for start, end in zip(starts, ends, strict=True)]
