"""Prometheus metrics of the guardrail. Labels are few and bounded: no values, no tenants, no paths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from aim_guardrail.detectors.batch_counts import BATCH_COUNTS
from aim_guardrail.detectors.threads import ABANDONED
from aim_guardrail.policy import Direction, PolicySet, Verdict

C = TypeVar("C", Counter, Histogram)

#: Seconds. A check takes 20 us (a token) to 100 ms (a whole book).
CHECK_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
#: Seconds. A batch detector takes 0.3 ms (a small model) to its budget, a remote one what its timeout allows.
DETECTOR_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.5, 1, 5, 30)
HELD_BUCKETS = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


class Metrics:
    """All metrics of one transformer. ``registry``: where ``/metrics`` looks; tests give their own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._requests = _children(
            Counter(
                "guardrail_requests",
                "Checked prompts and answers of requests, by decision (allow, flag, redact, block, timeout, error)",
                ("direction", "use_case", "decision"),
                registry=registry,
            )
        )
        self._detections = _children(
            Counter("guardrail_detections", "Values found", ("family", "label", "action"), registry=registry)
        )
        self._errors = _children(
            Counter("guardrail_errors", "Detectors that failed", ("detector", "reason"), registry=registry)
        )
        self._detector_seconds = _children(
            Histogram(
                "guardrail_detector_duration_seconds",
                "Time from asking a batch detector to its answer, or to its being given up, by what it came to "
                "(allowed, flagged, redacted, blocked, timeout, error, misconfigured)",
                ("detector", "family", "direction", "result"),
                buckets=DETECTOR_BUCKETS,
                registry=registry,
            )
        )
        self._timeouts = _children(
            Counter(
                "guardrail_timeouts",
                "Batch detectors that did not answer in their time; open: it passed, closed: it was refused",
                ("detector", "outcome"),
                registry=registry,
            )
        )
        self._skipped = _children(
            Counter(
                "guardrail_skipped",
                "Batch detectors that were not asked, or not to the end (early_stop, budget, breaker, cache)",
                ("detector", "reason"),
                registry=registry,
            )
        )
        self._budget_exceeded = _children(
            Counter(
                "guardrail_budget_exceeded",
                "Prompts and answers whose checks did not fit into the budget",
                ("use_case",),
                registry=registry,
            )
        )
        self._speculative = _children(
            Counter(
                "guardrail_speculative",
                "Requests sent before their verdict: kept, dropped (refused), repeated (redacted)",
                ("outcome",),
                registry=registry,
            )
        )
        self._cache = _children(
            Counter(
                "guardrail_cache",
                "Passages looked up among verdicts: in memory (l1), being asked about (flight), in Redis (l2)",
                ("tier", "result"),
                registry=registry,
            )
        )
        Gauge(
            "guardrail_abandoned_calls",
            "Calls of detectors that were given up and run on, in threads as a rule",
            registry=registry,
        ).set_function(lambda: ABANDONED.count)
        Gauge(
            "guardrail_queue_depth", "Callers that wait for a classifier of this process", registry=registry
        ).set_function(BATCH_COUNTS.waiting)
        registry.register(_BatchSizes())
        self._overhead = _children(
            Histogram(
                "guardrail_overhead_seconds",
                "Time spent on checking one request's prompt or answer",
                ("direction", "use_case"),
                buckets=CHECK_BUCKETS,
                registry=registry,
            )
        )
        self.hold_seconds = Histogram(
            "guardrail_stream_hold_seconds",
            "Time from a streamed text's arrival until the batch detectors' verdict on it",
            buckets=DETECTOR_BUCKETS,
            registry=registry,
        )
        self.held_chars = Histogram(
            "guardrail_stream_held_chars",
            "Characters of a streamed answer held back after each piece",
            buckets=HELD_BUCKETS,
            registry=registry,
        )
        self.in_use = 0
        Gauge(
            "guardrail_upstream_connections", "Connections to the predictor in use by a request", registry=registry
        ).set_function(lambda: self.in_use)
        self._upstream_errors = _children(
            Counter(
                "guardrail_upstream_errors",
                "Requests the predictor did not answer (connect, timeout, broken, invalid)",
                ("reason",),
                registry=registry,
            )
        )
        self._limited = _children(
            Counter(
                "guardrail_ratelimit",
                "What limits of traffic came to (allow, block, flag, log), by limit",
                ("limit", "result"),
                registry=registry,
            )
        )
        self._without_redis = _children(
            Counter(
                "guardrail_ratelimit_without_redis",
                "Times Redis did not count: this replica did (local), the policy decided (open, closed), or what was "
                "reserved stays reserved (unsettled)",
                ("outcome",),
                registry=registry,
            )
        )
        self._policy = Gauge(
            "guardrail_policy_info",
            "The policies in force (mode live), and those that are judged beside them (shadow)",
            ("name", "version", "mode"),
            registry=registry,
        )
        self._shadow = Counter(
            "guardrail_shadow",
            "What shadow policies made of prompts and answers, beside the policy in force",
            ("result",),
            registry=registry,
        )
        self._shadow_families = Counter(
            "guardrail_shadow_families",
            "Families that only a shadow policy found (added), or only the policy in force (missed)",
            ("family", "result"),
            registry=registry,
        )
        self._shadow_dropped = Counter(
            "guardrail_shadow_dropped",
            "Not judged by a shadow policy, for want of room",
            ("reason",),
            registry=registry,
        )
        self._feedback = Counter(
            "guardrail_feedback",
            "Verdicts that somebody says were wrong (false_positive, false_negative)",
            ("family", "label"),
            registry=registry,
        )
        self._in_force: set[tuple[str, str, str]] = set()
        self._reloads = Counter(
            "guardrail_policy_reload",
            "Changes of the policies: ok, invalid (not a policy), failed (a detector of it)",
            ("result",),
            registry=registry,
        )

    def shadow(self, result: Literal["same", "stricter", "laxer", "error"]) -> None:
        """A candidate has judged what the policy in force had judged."""
        self._shadow.labels(result).inc()

    def shadow_family(self, family: str, result: Literal["added", "missed"]) -> None:
        """Only the candidate has found a family, or only the policy in force."""
        self._shadow_families.labels(family, result).inc()

    def shadow_dropped(self, reason: Literal["queue", "size"]) -> None:
        """A candidate did not judge."""
        self._shadow_dropped.labels(reason).inc()

    def fed_back(self, family: str, label: str) -> None:
        """Somebody says that a verdict was wrong."""
        self._feedback.labels(family, label).inc()

    def policies(self, policies: PolicySet) -> None:
        """These are in force now."""
        live = {(policy.name, policy.version_hash, "live") for policy in policies}
        shadow = {(policy.name, policy.version_hash, "shadow") for policy in policies.shadows.values()}
        for labels in live | shadow:
            self._policy.labels(*labels).set(1)
        for labels in self._in_force - live - shadow:
            self._policy.remove(*labels)
        self._in_force = live | shadow

    def reloaded(self, result: Literal["ok", "invalid", "failed"]) -> None:
        """The policies were read anew."""
        self._reloads.labels(result).inc()

    def checked(self, direction: Direction, use_case: str, decision: str, seconds: float) -> None:
        """One request's prompt, or its answer, has been checked."""
        self._requests(direction, use_case, decision).inc()
        self._overhead(direction, use_case).observe(seconds)

    def answered(self, detector: str, family: str, direction: Direction, result: str, seconds: float) -> None:
        """A batch detector has answered, failed, or was given up."""
        self._detector_seconds(detector, family, direction, result).observe(seconds)

    def timed_out(self, detector: str, outcome: str) -> None:
        self._timeouts(detector, outcome).inc()

    def skipped(self, detector: str, reason: str) -> None:
        self._skipped(detector, reason).inc()

    def cached(self, tier: str, result: str, by: int = 1) -> None:
        """Passages were looked up: hit, miss or error."""
        self._cache(tier, result).inc(by)

    def speculated(self, outcome: str) -> None:
        """A request that was sent before its verdict has one."""
        self._speculative(outcome).inc()

    def budget_exceeded(self, use_case: str) -> None:
        self._budget_exceeded(use_case).inc()

    def detected(self, verdict: Verdict) -> None:
        """Count a final verdict's findings."""
        for finding in verdict.findings:
            self._detections(finding.family, finding.label, finding.action).inc()

    def detector_failed(self, detector: str, reason: str) -> None:
        self._errors(detector, reason).inc()

    def connection_taken(self, by: int) -> None:
        """One more (1) or one fewer (-1) connection to the predictor is in use."""
        self.in_use += by

    def limited(self, limit: str, result: str) -> None:
        """A limit of traffic has been looked at."""
        self._limited(limit, result).inc()

    def counted_without_redis(self, outcome: str) -> None:
        self._without_redis(outcome).inc()

    def upstream_failed(self, reason: str) -> None:
        self._upstream_errors(reason).inc()


class _BatchSizes(Collector):
    """Rows in the batches of this process's classifiers."""

    def collect(self) -> list[HistogramMetricFamily]:
        """As a registry asks."""
        buckets, rows = BATCH_COUNTS.sizes()
        found = HistogramMetricFamily("guardrail_batch_size", "Rows in a classifier's batch")
        found.add_metric([], buckets, rows)
        return [found]


def _children(metric: C) -> Callable[..., C]:
    """``metric.labels`` looked up once per label set: a dictionary instead of a lock."""
    return functools.cache(metric.labels)
