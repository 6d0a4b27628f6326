"""Prometheus' rules as typed values, and as a rule file has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Severity = Literal["critical", "warning"]


class Recording(NamedTuple):
    """A series that Prometheus computes. record: `LEVEL:METRIC:OPERATION`, Prometheus' own convention."""

    record: str
    expr: str
    labels: Mapping[str, str] = {}

    def as_rule(self) -> dict[str, Any]:
        """As a rule file has it."""
        return {"record": self.record, "expr": self.expr, **({"labels": dict(self.labels)} if self.labels else {})}


class Alert(NamedTuple):
    """Something that somebody has to do something about. lasting: for how long it must hold; critical: requests or
    days of training are being lost. summary: what is so, with its labels; remedy: what to do."""

    name: str
    severity: Severity
    lasting: str
    expr: str
    summary: str
    remedy: str

    def as_rule(self) -> dict[str, Any]:
        """As a rule file has it."""
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.lasting,
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "description": self.remedy},
        }


class Group(NamedTuple):
    """Rules that are computed together. interval: None: Prometheus' own."""

    name: str
    rules: Sequence[Recording | Alert]
    interval: str | None = None

    def as_group(self) -> dict[str, Any]:
        """As a rule file has it."""
        interval = {"interval": self.interval} if self.interval else {}
        return {"name": self.name, **interval, "rules": [rule.as_rule() for rule in self.rules]}


def rule_file(groups: Sequence[Group]) -> dict[str, Any]:
    """What Prometheus' `rule_files` name, and a PrometheusRule's spec."""
    return {"groups": [group.as_group() for group in groups]}
