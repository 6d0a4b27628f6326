"""What every detector family agrees on: `Finding`, the labels of each family, and the `Detector` protocol.

A detector of this kind is synchronous, thread-safe and cheap (well under a millisecond for a chat message):
it runs inline, on every prompt and on every released piece of an answer. Families that are not cheap
(classifiers, remote judges) do not fit this protocol and must not be forced into it: they are asynchronous,
want batches and deadlines, and look at sentence windows rather than at single values. They join one level up,
as a second stage behind `Guard`, after this stage has blocked or redacted what it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from aim_guardrail.text import Text


@dataclass(frozen=True, slots=True)
class Finding:
    """One detected value. It says where and what, never the value itself.

    `start` and `end` are code points of the original text (end exclusive); `score` is 0..1.
    """

    family: str
    label: str
    start: int
    end: int
    score: float
    rule_id: str


@dataclass(frozen=True, slots=True)
class Label:
    """A kind of value: the score from which it counts by default, and the highest score it can reach."""

    threshold: float
    top_score: float


FAMILIES: Mapping[str, Mapping[str, Label]] = {
    # The scanner's own words are "high", "medium" and "low" confidence; they count as 0.9, 0.6 and 0.3 here.
    "secrets": {"SECRET": Label(threshold=0.5, top_score=0.9)},
    # Scores are Presidio's: 1.0 where a checksum (or a public suffix) proved the value, else the pattern's
    # own. Thresholds are ours, per label, because Presidio's single default (0.5) would silently drop
    # every phone number (0.4 at most; 0.3 for one in national form that nothing marks as such).
    "pii": {
        "CREDIT_CARD": Label(threshold=1.0, top_score=1.0),
        "CRYPTO": Label(threshold=1.0, top_score=1.0),
        "EMAIL_ADDRESS": Label(threshold=0.5, top_score=1.0),
        "IBAN_CODE": Label(threshold=0.5, top_score=1.0),
        "IP_ADDRESS": Label(threshold=0.5, top_score=0.6),
        "PHONE_NUMBER": Label(threshold=0.4, top_score=0.4),
        "US_SSN": Label(threshold=0.5, top_score=0.5),
    },
}
"""Every family and label a policy can name. The order of families is their precedence where spans overlap."""


class Detector(Protocol):
    """Finds values of one family in a text.

    Contract, relied upon by the streaming guard: whether a value is found, and its span, depends only on the
    unit it lies in (see `aim_guardrail.text.units`), on at most `text.CONTEXT_CHARS` characters before that
    unit and on the one character after it. So a finding never crosses a unit's edge.
    """

    @property
    def family(self) -> str:
        """A key of FAMILIES."""

    @property
    def labels(self) -> frozenset[str]:
        """The labels this instance looks for."""

    def may_find(self, scan: str) -> bool:
        """Whether these whole units (folded) could hold a value: a cheap test without false negatives."""

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        """The values in `text` that end after `since`, an index of `text.scan` between units; in any order,
        overlaps allowed. What lies before `since` is left context only.
        """
