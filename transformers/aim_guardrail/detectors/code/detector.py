"""Licences, marks of ownership and dangerous code: RE2 finds where a rule may begin, the rule looks from there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

from aim_guardrail.detectors.base import Finding
from aim_guardrail.detectors.code.dangers import DANGER_RULES
from aim_guardrail.detectors.code.labels import CODE_LABELS
from aim_guardrail.detectors.code.licences import LICENCE_RULES
from aim_guardrail.detectors.code.rule import CodeRule, Spot
from aim_guardrail.detectors.decoded import says_text, with_views
from aim_guardrail.detectors.linear_patterns import LinearPattern
from aim_guardrail.text import CONTEXT_CHARS, Text

RULES: tuple[CodeRule, ...] = (*LICENCE_RULES, *DANGER_RULES)


class CodeDetector:
    """Finds the labels it is given. Thread-safe; linear in the text, some 10 us at 4 KB of prose."""

    family: ClassVar[str] = "code"

    def __init__(self, labels: frozenset[str]) -> None:
        if unknown := labels - CODE_LABELS.keys():
            raise ValueError(f"unknown entities {', '.join(sorted(unknown))}")
        self.labels = labels
        self._by_head: dict[str, list[CodeRule]] = {}
        for rule in RULES:
            for head in rule.heads:
                self._by_head.setdefault(head, []).append(rule)
        self._heads = LinearPattern(f"(?i){_any_word(self._by_head)}")
        self._ends = LinearPattern("(?i)" + "|".join(f"(?:{rule.ends})" for rule in RULES))

    def may_find(self, scan: str) -> bool:
        """Whether any rule's end is in it."""
        return self._ends.search(scan) or says_text(scan)

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        """What ends after `since`; one finding a span and label."""
        return with_views(text, since, self._plain)

    def _plain(self, text: Text, since: int) -> list[Finding]:
        scan, first = text.scan, max(0, since - CONTEXT_CHARS)
        spots: dict[tuple[int, int, str], tuple[Spot, str]] = {}
        for start, end in self._heads.spans(scan, first):
            for rule in self._by_head[scan[start:end].lower()]:
                for spot in rule.spots(scan, start):
                    if spot.start >= since and spot.label in self.labels:
                        spots.setdefault(spot[:3], (spot, rule.id))
        return [
            Finding("code", spot.label, *text.span(spot.start, spot.end), spot.score, f"aim.{rule_id}")
            for spot, rule_id in spots.values()
        ]


def _any_word(words: Iterable[str]) -> str:
    """A pattern of RE2 for each of the words as a whole, the longest first."""
    longest = sorted(words, key=lambda word: (-len(word), word))
    return "|".join(_edge(word[0]) + re.escape(word) + _edge(word[-1]) for word in longest)


def _edge(char: str) -> str:
    return r"\b" if char.isalnum() or char == "_" else ""
