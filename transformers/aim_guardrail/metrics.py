"""Prometheus metrics of the guardrail. Labels are few and bounded: no values, no tenants, no paths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from aim_guardrail.policy import Direction, Policy, Verdict

C = TypeVar("C", Counter, Histogram)

#: Seconds. A check takes 20 us (a token) to 100 ms (a whole book).
CHECK_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
HELD_BUCKETS = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


class Metrics:
    """All metrics of one transformer. ``registry``: where ``/metrics`` looks; tests give their own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._requests = _children(
            Counter(
                "guardrail_requests",
                "Checked prompts and answers of requests, by decision (allow, flag, redact, block, error)",
                ("direction", "decision"),
                registry=registry,
            )
        )
        self._detections = _children(
            Counter("guardrail_detections", "Values found", ("family", "label", "action"), registry=registry)
        )
        self._errors = _children(
            Counter("guardrail_errors", "Detectors that failed", ("detector", "reason"), registry=registry)
        )
        self._overhead = _children(
            Histogram(
                "guardrail_overhead_seconds",
                "Time spent on checking one request's prompt or answer",
                ("direction",),
                buckets=CHECK_BUCKETS,
                registry=registry,
            )
        )
        self.held_chars = Histogram(
            "guardrail_stream_held_chars",
            "Characters of a streamed answer held back after each piece",
            buckets=HELD_BUCKETS,
            registry=registry,
        )
        self.in_use = 0
        self._connections = Gauge(
            "guardrail_upstream_connections", "Connections to the predictor in use by a request", registry=registry
        )
        self._upstream_errors = _children(
            Counter(
                "guardrail_upstream_errors",
                "Requests the predictor did not answer (connect, timeout, broken, invalid)",
                ("reason",),
                registry=registry,
            )
        )
        self._policy = Gauge("guardrail_policy_info", "The policy in force", ("name", "version"), registry=registry)

    def policy(self, policy: Policy) -> None:
        self._policy.labels(policy.name, policy.version_hash).set(1)

    def checked(self, direction: Direction, decision: str, seconds: float) -> None:
        """One request's prompt, or its answer, has been checked."""
        self._requests(direction, decision).inc()
        self._overhead(direction).observe(seconds)

    def detected(self, verdict: Verdict) -> None:
        """Count a final verdict's findings."""
        for finding in verdict.findings:
            self._detections(finding.family, finding.label, finding.action).inc()

    def detector_failed(self, detector: str, reason: str) -> None:
        self._errors(detector, reason).inc()

    def connection_taken(self, by: int) -> None:
        """One more (1) or one fewer (-1) connection to the predictor is in use."""
        self.in_use += by
        self._connections.set(self.in_use)

    def upstream_failed(self, reason: str) -> None:
        self._upstream_errors(reason).inc()


def _children(metric: C) -> Callable[..., C]:
    """``metric.labels`` looked up once per label set: a dictionary instead of a lock."""
    return functools.cache(metric.labels)
