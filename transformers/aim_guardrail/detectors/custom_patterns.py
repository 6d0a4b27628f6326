"""A user's own patterns, searched run by run: what matches lies between two breaks, so that streams find the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from aim_guardrail.detectors.digit_rows import Hit
from aim_guardrail.detectors.linear_patterns import LinearPattern
from aim_guardrail.detectors.pii_options import CustomPattern
from aim_guardrail.detectors.words import words_before
from aim_guardrail.text import BREAKS

_RUN = re.compile(f"[^{BREAKS}]+")


class CustomPatterns:
    """Thread-safe; linear in the text."""

    def __init__(self, patterns: Sequence[CustomPattern]) -> None:
        self._any = LinearPattern("|".join(f"(?:{each.pattern})" for each in patterns))
        self._each = [(each, LinearPattern(each.pattern), frozenset(each.context)) for each in patterns]

    def may_find(self, scan: str) -> bool:
        """Whether any matches, its context aside."""
        return self._any.search(scan)

    def hits(self, scan: str, since: int) -> Iterator[tuple[str, Hit]]:
        """Every match from `since` (between units) on, with its label."""
        wanted = [each for each in self._each if each[1].search(scan[since:])]
        if not wanted:
            return
        for run in _RUN.finditer(scan, since):
            text, first = run[0], run.start()
            for custom, pattern, words in wanted:
                for start, end in pattern.spans(text):
                    if not words or not words.isdisjoint(words_before(scan, first + start)):
                        yield custom.label, Hit(first + start, first + end, custom.score)
