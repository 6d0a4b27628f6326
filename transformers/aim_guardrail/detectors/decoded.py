"""Decoded views: what runs of Base64, of hexadecimal digits and of percent-encoding say, where they say text.

A run holds no break, so it lies within one unit (`aim_guardrail.text`), and its view is searched alone: what is found
in it is found of the whole run, and a stream comes out as the whole text does. Linear: every run is decoded once, and
what a view says is not decoded again.
"""

from __future__ import annotations

import base64
import binascii
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from aim_guardrail.detectors.base import Finding
from aim_guardrail.detectors.linear_patterns import LinearPattern
from aim_guardrail.text import Text

_LEAST_CHARS = 16  # a dozen bytes: what is shorter decodes to text by chance
RUN = r"(?:[A-Za-z0-9._~-]*%[0-9A-Fa-f]{2}){3,}[A-Za-z0-9._~-]*|[A-Za-z0-9+/_-]{16,}={0,2}"  # percent; Base64, hex
_RUN = LinearPattern(RUN)
_HEX = re.compile("(?:[0-9A-Fa-f]{2})+")
_EDGE = re.compile("[/_-]")
_URL_SAFE = str.maketrans("-_", "+/")


class View(NamedTuple):
    """The text that a run `[start, end)` of folded text stands for."""

    start: int
    end: int
    text: str


def views_of(scan: str, since: int = 0) -> Iterator[View]:
    """The views of the runs in `scan` from `since` (between units) on."""
    for start, end in _RUN.spans(scan[since:]):
        run = scan[since + start : since + end]
        text = _decoded(run)
        if text is not None:
            yield View(since + start, since + end, text)
        elif "%" not in run and _EDGE.search(run):
            yield from _pieces(run, since + start)


def says_text(scan: str) -> bool:
    """Whether any run in these whole units does."""
    return len(scan) >= _LEAST_CHARS and next(views_of(scan), None) is not None


_start = attrgetter("start")


def with_views(text: Text, since: int, search: Callable[[Text, int], list[Finding]]) -> list[Finding]:
    """What `search` finds in the text from `since` on, and in each view, as found of its whole run, unless it was found
    in the run as it stands.
    """
    plain = sorted(search(text, since), key=_start)
    if text.decoded is None or text.decoded[0] != since:
        text.decoded = since, list(views_of(text.scan, since))
    return [*plain, *(f for view in text.decoded[1] for f in _of_run(text, View(*view), search, plain))]


def _of_run(
    text: Text, view: View, search: Callable[[Text, int], list[Finding]], plain: list[Finding]
) -> Iterator[Finding]:
    by_label: dict[str, list[Finding]] = {}
    for finding in search(Text(view.text), 0):
        by_label.setdefault(finding.label, []).append(finding)
    start, end = text.span(view.start, view.end)
    inside = plain[bisect_left(plain, start, key=_start) : bisect_left(plain, end, key=_start)]
    for label, found in by_label.items():
        seen = sum(f.label == label and f.end <= end for f in inside)
        if seen < len(found):
            best = max(found, key=lambda finding: finding.score)
            yield best._replace(start=start, end=end, rule_id=f"{best.rule_id}.decoded")


def _pieces(run: str, start: int) -> Iterator[View]:
    """Of a path or a name, the parts that say text."""
    at = 0
    for part in re.split(_EDGE, run):
        if len(part) >= _LEAST_CHARS and (text := _decoded(part)) is not None:
            yield View(start + at, start + at + len(part), text)
        at += len(part) + 1


def _decoded(run: str) -> str | None:
    """What a run says; None: no text."""
    if "%" in run:
        return _text(unquote_to_bytes(run))
    if len(run) % 2 == 0 and _HEX.fullmatch(run):
        return _text(bytes.fromhex(run))
    plain = run.rstrip("=").translate(_URL_SAFE)
    try:
        return _text(base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True))
    except binascii.Error:
        return None


def _text(raw: bytes) -> str | None:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    return text if text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable() else None
