"""The families `safety` (guard models, all their categories at once) and `compliance` (a policy's own written rules, by
any model). Cheap to import: a detector's engine loads when it is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aim_guardrail.detectors.base import BatchDetector, Label
from aim_guardrail.detectors.family import Family, Wanted
from aim_guardrail.detectors.judge.compliance import ComplianceOptions
from aim_guardrail.detectors.judge.safety import SafetyOptions


def _safety(wanted: Wanted) -> BatchDetector:
    from aim_guardrail.detectors.judge.detector import Judge

    assert isinstance(wanted.options, SafetyOptions)
    return Judge.of_safety(wanted.options)


def _compliance(wanted: Wanted) -> BatchDetector:
    from aim_guardrail.detectors.judge.detector import Judge

    assert isinstance(wanted.options, ComplianceOptions)
    return Judge.of_compliance(wanted.options)


def _labels(names: Iterable[str]) -> Mapping[str, Label]:
    return {name: Label(threshold=0.5, top_score=1.0) for name in names}


SAFETY = Family("safety", "batch", {}, _safety, SafetyOptions, lambda options: _labels(options.guard.labels))
COMPLIANCE = Family(
    "compliance",
    "batch",
    {},
    _compliance,
    ComplianceOptions,
    lambda options: _labels(rule.id for rule in options.rules),
)
