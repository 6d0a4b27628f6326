"""Verdicts: what findings come to under a policy's rules. Pure; knows nothing of detectors, servers or streams."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from aim_guardrail.detectors.base import Finding
from aim_guardrail.detectors.families import FAMILIES
from aim_guardrail.policy.policy import Rule

_FAMILY_ORDER = {family: rank for rank, family in enumerate(FAMILIES)}
_ACTION_ORDER = {"block": 0, "redact": 1, "flag": 2, "log": 3}
_VERDICT_ORDER = {"block": 0, "redact": 1, "flag": 2, "allow": 3}
_span = attrgetter("start", "end")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check came to.

    Attributes:
        families: those with a finding that the client is told of.
        findings: what counts, each with its action; those that are only logged, too.
        degraded: the detectors that failed, or were not asked, under `open`.
    """

    action: Literal["allow", "flag", "redact", "block"] = "allow"
    families: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    degraded: tuple[str, ...] = ()

    @property
    def blocked(self) -> bool:
        """Whether the text must not pass at all."""
        return self.action == "block"

    def joined(self, later: Verdict) -> Verdict:
        """The verdict on this text and the one that follows it."""
        return Verdict(
            min(self.action, later.action, key=_VERDICT_ORDER.__getitem__),
            _ordered({*self.families, *later.families}),
            self.findings + later.findings,
            tuple(sorted({*self.degraded, *later.degraded})),
        )


def decide(findings: Iterable[Finding], rules: Sequence[Rule], degraded: tuple[str, ...] = ()) -> Verdict:
    """The verdict of `rules` on `findings`, each with the action of its rule. Where findings overlap, one remains: the
    strictest action, then the family's precedence, then the score, then the length decide; it covers all that
    overlapped, so that no part of a weaker finding stays visible. What is flagged or logged never widens a redaction.
    """
    by_name = {rule.name: rule for rule in rules}
    by_family = {rule.type: rule for rule in reversed(rules)}
    kept = list[Finding]()
    for finding in findings:
        rule = by_name.get(finding.detector) if finding.detector else by_family.get(finding.family)
        if rule is not None and rule.applies(finding):
            kept.append(Finding(*finding[:-1], rule.action_on(finding.label)))  # a third of what _replace costs
    return settle(kept, degraded)


def settle(findings: Iterable[Finding], degraded: tuple[str, ...] = ()) -> Verdict:
    """The verdict on findings that have their actions, such as those of several detectors on one text."""
    kept = sorted(findings, key=_span)
    if not kept:
        return Verdict(degraded=degraded)
    hard = [f for f in kept if f.action in ("block", "redact")]
    final = _merge(hard)
    for action in ("flag", "log") if len(hard) < len(kept) else ():
        if soft := _merge([f for f in kept if f.action == action]):
            final = sorted([*final, *_apart_from(final, soft)], key=_span)
    told = [f for f in final if f.action != "log"]
    if not told:
        return Verdict(findings=tuple(final), degraded=degraded)
    strictest: Any = min({f.action for f in told}, key=_ACTION_ORDER.__getitem__)
    return Verdict(strictest, _ordered({f.family for f in told}), tuple(final), degraded)


def _apart_from(final: list[Finding], soft: list[Finding]) -> list[Finding]:
    """Those of `soft` that overlap none of `final`, which lie apart, in their order: the last to begin ends last."""
    starts = [finding.start for finding in final]
    before = [bisect_left(starts, f.end) for f in soft]
    return [f for f, at in zip(soft, before, strict=True) if not at or final[at - 1].end <= f.start]


def _ordered(families: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(families, key=lambda family: (_FAMILY_ORDER.get(family, len(_FAMILY_ORDER)), family)))


def _precedence(f: Finding) -> tuple[int, int, float, int, str]:
    return (
        _ACTION_ORDER[f.action],
        _FAMILY_ORDER.get(f.family, len(_FAMILY_ORDER)),
        -f.score,
        f.start - f.end,
        f.rule_id,
    )


def _merge(findings: list[Finding]) -> list[Finding]:
    """One in the place of those, in their order, that overlap."""
    merged: list[Finding] = []
    for finding in findings:
        if merged and finding.start < merged[-1].end:
            last = merged[-1]
            winner = min(last, finding, key=_precedence)
            merged[-1] = winner._replace(start=last.start, end=max(last.end, finding.end))
        else:
            merged.append(finding)
    return merged
