"""What a rule of the code family is: words that begin it, and the words that end it, which are what is found.

Text may be a stream's, so a finding lies within one unit (`aim_guardrail.text`) and knows at most `CONTEXT_CHARS`
before it: `curl … | sh` is found at its `sh`, `GNU General Public License` at its last word. A pattern is therefore
matched from every one of its heads alone, is no longer than the context, captures no break, and looks at one character
behind what it captures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Spot(NamedTuple):
    """What a rule found in a folded text: `[start, end)`, its label, and its score (0..1)."""

    start: int
    end: int
    label: str
    score: float


class CodeRule(Protocol):
    """`heads`: the words it may begin with, in lower case; `ends`: patterns for RE2, one of which is in every end."""

    @property
    def id(self) -> str: ...
    @property
    def heads(self) -> tuple[str, ...]: ...
    @property
    def ends(self) -> str: ...
    def spots(self, scan: str, head: int) -> Iterator[Spot]:
        """What it finds from the head at this index on. Bounded work."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """A pattern that begins with a head and captures its end: the first group that took part."""

    id: str
    label: str
    score: float
    heads: tuple[str, ...]
    ends: str
    pattern: re.Pattern[str]

    def spots(self, scan: str, head: int) -> Iterator[Spot]:
        match = self.pattern.match(scan, head)
        if match is not None and match.lastindex is not None:
            yield Spot(*match.span(match.lastindex), self.label, self.score)


def phrase(rule_id: str, label: str, heads: str, ends: str, pattern: str, score: float = 0.9) -> Phrase:
    """A rule; `heads`: parted by spaces; `pattern`: verbose."""
    return Phrase(rule_id, label, score, tuple(heads.split()), ends, re.compile(pattern, re.VERBOSE | re.ASCII))
