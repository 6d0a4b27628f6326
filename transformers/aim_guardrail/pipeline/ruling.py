"""Rulings: verdicts on slots, and the texts as they may pass under them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aim_guardrail.detectors.base import Finding
from aim_guardrail.pipeline.session import Session
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
