"""The operator's own families, registered as its process registers them, for who reads them without a cluster."""

from __future__ import annotations

from typing import Any

import kopf
from prometheus_client import CollectorRegistry

from aim_operator import controllers, webhooks
from aim_operator.audit import Audit
from aim_operator.operator import Operator
from aim_operator.part import Shared
from aim_operator.run import _Run
from aim_operator.settings import Settings


class OperatorMetrics:
    """registry: all families. Nothing is asked of a cluster."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        settings, audit = Settings(), Audit(None, self.registry)
        nowhere: Any = None
        operator = Operator(settings, nowhere, audit, self.registry)
        for part in (webhooks, controllers):
            part.register(kopf.OperatorRegistry(), operator)
        _Run(Shared(settings, audit, self.registry))

    def labels(self) -> dict[str, set[str]]:
        """Of each family, by its name on the page."""
        found = {}
        for collector, (name, *more) in self.registry._collector_to_names.items():
            total = f"{name}_total"
            found[total if total in more else name] = set(getattr(collector, "_labelnames", ()))
        return found

    def of(self, family: str, *labels: str) -> Any:
        """A family, or its series of these labels."""
        collector: Any = self.registry._names_to_collectors[family]
        return collector.labels(*labels) if labels else collector
