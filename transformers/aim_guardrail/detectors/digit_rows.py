"""Rows of digits: groups of digits with what may stand between the groups of one number. Cards and phones lie in them.

A row never crosses a unit (see `aim_guardrail.text`): its gaps are those that units are joined over, and characters
that are no breaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aim_guardrail.text import CONTEXT_CHARS

_GAP = r"[-x./ ()\[\]~]"
_ROW = re.compile(rf"[0-9]+(?:(?:%2[0Dd]|\+|{_GAP}{{1,6}})[0-9]+)*+")
_GROUP = re.compile(r"(?:%2[0Dd])?([0-9]+)")
_URI_END = re.compile(r"[\s\"'`]")
_LEAST_CHARS = 7  # the shortest number anybody looks for


class Hit(NamedTuple):
    """A value in a text: `[start, end)`, and its score (0..1)."""

    start: int
    end: int
    score: float


class Row:
    """A row `[start, end)` within `scan`.

    Attributes:
        groups: the spans of its groups, in order; found when they are first asked for, which of a row that is too
            short, or known to be something else, they never are.
    """

    __slots__ = ("end", "groups", "scan", "start")
    groups: Sequence[tuple[int, int]]

    def __init__(self, scan: str, start: int, end: int) -> None:
        self.scan, self.start, self.end = scan, start, end

    def __getattr__(self, name: str) -> Sequence[tuple[int, int]]:
        """Asked only for what has not been set."""
        if name != "groups":
            raise AttributeError(name)
        self.groups = [group.span(1) for group in _GROUP.finditer(self.scan, self.start, self.end)]
        return self.groups

    def gap(self, index: int) -> str:
        """What stands before the group of that index, percent-encoding undone; `""` before the first."""
        gap = self.scan[self.groups[index - 1][1] : self.groups[index][0]] if index else ""
        return unquoted(gap) if gap[:1] == "%" else gap

    def digits(self, first: int, last: int) -> str:
        """The digits of the groups `first` to `last` (both included)."""
        return "".join([self.scan[start:end] for start, end in self.groups[first : last + 1]])

    def lengths(self, first: int, last: int) -> tuple[int, ...]:
        """How many digits each of these groups has."""
        return tuple([end - start for start, end in self.groups[first : last + 1]])


def rows(scan: str, since: int) -> Iterator[Row]:
    """The rows that begin at `since` or later and are long enough to hold a number."""
    for row in _ROW.finditer(scan, since):
        start, end = row.span()
        if end - start >= _LEAST_CHARS:
            whole = Row(scan, start, end)
            yield from _outside_uris(whole) if scan.find(")", start, end) >= 0 else (whole,)


def _outside_uris(row: Row) -> Iterator[Row]:
    """A URI takes brackets with it and ends at a space, and its unit with it: `http://h/(212) 555`."""
    scan, groups, first = row.scan, row.groups, 0
    for index in range(1, len(groups)):
        end, start = groups[index - 1][1], groups[index][0]
        if scan.find(" ", end + 1, start) >= 0 and in_uri(scan, end):
            yield Row(scan, groups[first][0], end)
            first = index
    yield Row(scan, groups[first][0], row.end)


def in_uri(scan: str, index: int) -> bool:
    """Whether a URI that began before `index` goes on there."""
    begin = max(index - CONTEXT_CHARS, 0)
    scheme = scan.rfind("://", begin, index)
    return scheme >= 0 and _URI_END.search(scan, scheme, index) is None


def unquoted(value: str) -> str:
    """The value with the separators that a URL writes as %20 and %2D."""
    return value.replace("%20", " ").replace("%2D", "-").replace("%2d", "-")
