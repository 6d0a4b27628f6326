"""Rulings: verdicts on slots, and the texts as they may pass under them. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from aim_guardrail.detectors.base import Finding
from aim_guardrail.pipeline.session import Session, placeholder_end
from aim_guardrail.policy import Verdict
from aim_guardrail.text import Text


@dataclass(frozen=True, slots=True)
class Ruling:
    """The verdict on one slot, or on neighbours that are one text: its findings count code points from their first.

    `slots`: their indexes.
    """

    slots: tuple[int, ...]
    verdict: Verdict


def redacted(
    texts: Sequence[str], rulings: Iterable[Ruling], session: Session, kept: frozenset[str] = frozenset()
) -> list[str]:
    """Each of the slots' texts as it may pass; `kept`: see `redact_parts`."""
    shown = list(texts)
    for ruling in rulings:
        if ruling.verdict.action == "redact":
            parts = redact_parts([shown[at] for at in ruling.slots], ruling.verdict.findings, session, kept)
            for at, text in zip(ruling.slots, parts, strict=True):
                shown[at] = text
    return shown


def redact_parts(
    parts: Sequence[str], findings: Iterable[Finding], session: Session, kept: frozenset[str] = frozenset()
) -> list[str]:
    """The parts of one text; a placeholder stands in the part that its value begins in.

    `kept`: the detectors, or families, whose values go into the session's vault.
    """
    hidden = [finding for finding in findings if finding.action == "redact"]
    whole, shown, start, at = "".join(parts), list[str](), 0, 0
    for part in parts:
        end, pieces, done = start + len(part), list[str](), start
        while at < len(hidden) and hidden[at].start < end:
            finding = hidden[at]
            pieces.append(whole[done : max(finding.start, start)])
            if finding.start >= start:
                value = whole[finding.start : finding.end]
                keeps = (finding.detector or finding.family) in kept
                pieces.append(session.placeholder(finding.label, Text(value).scan, value if keeps else None))
            done = min(finding.end, end)
            if finding.end > end:
                break  # goes on in the next part
            at += 1
        shown.append("".join([*pieces, whole[done:end]]))
        start = end
    return shown


def as_sent(rulings: Sequence[Ruling], before: Iterable[Ruling], shown: Sequence[str]) -> list[Ruling]:
    """``rulings`` on texts that have been redacted, their findings where they are in the texts before that; what lies
    over part of a placeholder is over all that the placeholder stands for.

    Args:
        before: the rulings by which they were redacted.
        shown: each slot's text as it is since.
    """
    hidden = {ruling.slots: ruling.verdict.findings for ruling in before if ruling.verdict.action == "redact"}
    return [
        ruling
        if ruling.slots not in hidden
        else _moved(ruling, _Placeholders("".join(shown[at] for at in ruling.slots), hidden[ruling.slots]))
        for ruling in rulings
    ]


class _Placeholders:
    """Where a redacted text's placeholders stand, and what they stand for."""

    def __init__(self, shown: str, findings: Iterable[Finding]) -> None:
        self._starts, self._ends = [0], [0]  # in the redacted text; before the first is nothing
        self._sent = [(0, 0)]  # the same of what they stand for
        for finding in findings:
            if finding.action == "redact":
                self._starts.append(self._ends[-1] + finding.start - self._sent[-1][1])
                self._ends.append(placeholder_end(shown, self._starts[-1], finding.label))
                self._sent.append((finding.start, finding.end))

    def start(self, at: int) -> int:
        """Where what begins at ``at`` begins in the text before."""
        last = bisect_right(self._starts, at) - 1
        begin, end = self._sent[last]
        return begin if at < self._ends[last] else end + at - self._ends[last]

    def end(self, at: int) -> int:
        """Where what ends at ``at`` ends in the text before."""
        last = bisect_left(self._starts, at, lo=1) - 1
        return self._sent[last][1] + max(0, at - self._ends[last])


def _moved(ruling: Ruling, placeholders: _Placeholders) -> Ruling:
    findings = (
        finding._replace(start=placeholders.start(finding.start), end=placeholders.end(finding.end))
        for finding in ruling.verdict.findings
    )
    return Ruling(ruling.slots, replace(ruling.verdict, findings=tuple(findings)))
