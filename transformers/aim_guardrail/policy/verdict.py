"""Verdicts: what findings come to under a policy's rules. Pure; knows nothing of detectors, servers or streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from aim_guardrail.detectors.base import FAMILIES, Finding
from aim_guardrail.policy.policy import Action, Rule

_FAMILY_ORDER = {family: rank for rank, family in enumerate(FAMILIES)}
_ACTION_ORDER = {"block": 0, "redact": 1, "flag": 2}
_VERDICT_ORDER = {**_ACTION_ORDER, "allow": 3}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check came to. `families` and `findings` are those that count; `degraded` names the detectors
    that failed under `on_error: open`.
    """

    action: Literal["allow", "flag", "redact", "block"] = "allow"
    families: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = field(default=())
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
    """The verdict of `rules` on `findings`. Where findings overlap, one remains: the strictest action, then
    the family's precedence, then the score, then the length decide; it covers all that overlapped, so that
    no part of a weaker finding stays visible. A flag never widens what is redacted.
    """
    by_family = {rule.type: rule for rule in rules}
    kept = [f for f in findings if f.family in by_family and by_family[f.family].applies(f)]
    acts = {rule.type: rule.action for rule in rules}
    hard = _merge([f for f in kept if acts[f.family] != "flag"], acts)
    soft = _merge([f for f in kept if acts[f.family] == "flag"], acts)
    soft = [f for f in soft if not any(f.start < h.end and h.start < f.end for h in hard)]
    final = sorted(hard + soft, key=lambda f: f.start)
    if not final:
        return Verdict(degraded=degraded)
    action = min((acts[f.family] for f in final), key=_ACTION_ORDER.__getitem__)
    return Verdict(action, _ordered({f.family for f in final}), tuple(final), degraded)


def _ordered(families: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(families, key=lambda family: (_FAMILY_ORDER.get(family, len(_FAMILY_ORDER)), family)))


def _merge(findings: list[Finding], acts: dict[str, Action]) -> list[Finding]:
    def precedence(f: Finding) -> tuple[int, int, float, int, str]:
        return (_ACTION_ORDER[acts[f.family]], _FAMILY_ORDER[f.family], -f.score, f.start - f.end, f.rule_id)

    merged: list[Finding] = []
    for finding in sorted(findings, key=lambda f: (f.start, f.end)):
        if merged and finding.start < merged[-1].end:
            last = merged[-1]
            winner = min(last, finding, key=precedence)
            merged[-1] = replace(winner, start=last.start, end=max(last.end, finding.end))
        else:
            merged.append(finding)
    return merged
