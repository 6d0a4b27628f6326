"""Prometheus metrics of the runtime: the same names for every engine, one label set per model and engine.

Counters and histograms are fed by the requests, the gauges by :meth:`Engine.stats` when Prometheus asks. Children are
looked up once per operation and status, so that a request costs a few dictionary look-ups and locks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from aim_kserve.access import current_log
from aim_runtime.engines.base import Engine, Usage

MODEL_LABELS = ("model_name", "engine")
OPERATION_LABELS = (*MODEL_LABELS, "operation")
#: Seconds. Answers take 10 ms (a tokenisation) to minutes (a long answer on a small partition).
DURATION_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
#: Chunks of an OpenAI stream that carry no token: the role that opens a chat, the bare finish reason, the usage.
NO_TOKEN = re.compile(rb'"content":""|"text":""|"delta":\{\}|"choices":\[\]')


class Metrics:
    """All metrics of one model on one engine.

    Args:
        model_name: label ``model_name``.
        engine: label ``engine`` is its name; its stats are read at scrape time.
        registry: where ``/metrics`` looks; tests give their own.
    """

    def __init__(self, model_name: str, engine: Engine, registry: CollectorRegistry = REGISTRY) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.model_name = model_name
        labels = (model_name, engine.name)
        self._requests = Counter(
            "aim_requests",
            "Requests answered, by HTTP status (499: the client left)",
            (*OPERATION_LABELS, "status"),
            registry=registry,
        )
        self._ignored = Counter(
            "aim_ignored_fields",
            "Fields of request bodies that no operation knows and that were ignored (header x-ignored-fields)",
            OPERATION_LABELS,
            registry=registry,
        )
        self._duration = Histogram(
            "aim_request_duration_seconds",
            "Time from a parsed request to its last token",
            OPERATION_LABELS,
            buckets=DURATION_BUCKETS,
            registry=registry,
        )

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, MODEL_LABELS, registry=registry).labels(*labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, MODEL_LABELS, buckets=buckets, registry=registry).labels(*labels)

        self.first_token = histogram(
            "aim_time_to_first_token_seconds", "Time to the first token of a streamed answer", TTFT_BUCKETS
        )
        self.next_token = histogram(
            "aim_inter_token_latency_seconds", "Time between the chunks of a streamed answer", ITL_BUCKETS
        )
        self._prompt = counter("aim_prompt_tokens", "Tokens of prompts")
        self._generated = counter("aim_generation_tokens", "Tokens generated")
        self._cached = counter("aim_cached_prompt_tokens", "Prompt tokens found in the KV cache")
        self._labels = labels
        self._requests_by: dict[tuple[str, int], Counter] = {}
        self._duration_by: dict[str, Histogram] = {}
        registry.register(_EngineGauges(labels, engine))

    def finished(self, operation: str, status: int, duration_s: float, usage: Usage) -> None:
        """Count one request that has ended."""
        key = (operation, status)
        requests = self._requests_by.get(key)
        if requests is None:
            requests = self._requests_by[key] = self._requests.labels(*self._labels, operation, str(status))
        requests.inc()
        duration = self._duration_by.get(operation)
        if duration is None:
            duration = self._duration_by[operation] = self._duration.labels(*self._labels, operation)
        duration.observe(duration_s)
        if usage.prompt_tokens:
            self._prompt.inc(usage.prompt_tokens)
        if usage.completion_tokens:
            self._generated.inc(usage.completion_tokens)
        if usage.cached_tokens:
            self._cached.inc(usage.cached_tokens)

    def ignored(self, operation: str, count: int) -> None:
        """Count fields of a body that were ignored."""
        self._ignored.labels(*self._labels, operation).inc(count)


class Meter:
    """One request's clock."""

    __slots__ = ("_last", "_metrics", "_operation", "_started", "_ttft_s", "_usage")

    def __init__(self, metrics: Metrics, operation: str, usage: Usage) -> None:
        self._metrics = metrics
        self._operation = operation
        self._usage = usage
        self._started = time.perf_counter()
        self._last = 0.0
        self._ttft_s: float | None = None

    def end(self, status: int) -> None:
        """The request has ended: count it, and leave its figures in the access log."""
        usage = self._usage
        self._metrics.finished(self._operation, status, time.perf_counter() - self._started, usage)
        log = current_log()
        log.fields["model"] = self._metrics.model_name
        if usage.prompt_tokens:
            log.add(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
        if usage.cached_tokens:
            log.add(cached_tokens=usage.cached_tokens)
        if self._ttft_s is not None:
            log.fields["ttft_ms"] = round(self._ttft_s * 1e3, 3)

    def tick(self, chunk: bytes) -> None:
        """A chunk of a streamed answer is here."""
        if NO_TOKEN.search(chunk):
            return
        now = time.perf_counter()
        if self._last:
            self._metrics.next_token.observe(now - self._last)
        else:
            self._ttft_s = now - self._started
            self._metrics.first_token.observe(self._ttft_s)
        self._last = now


class _EngineGauges(Collector):
    """What the engine is doing at the moment of a scrape."""

    def __init__(self, labels: tuple[str, str], engine: Engine) -> None:
        self._labels = labels
        self._engine = engine

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Names only: registering must not ask an engine that is not loaded."""
        return iter([GaugeMetricFamily(name, text) for name, text in _GAUGES.items()])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats = self._engine.stats()
        values = (stats.running, stats.waiting, stats.slots_total, stats.kv_cache_usage, stats.stalled_s)
        for (name, text), value in zip(_GAUGES.items(), values, strict=True):
            if value is not None:
                family = GaugeMetricFamily(name, text, labels=MODEL_LABELS)
                family.add_metric(self._labels, value)
                yield family


_GAUGES = {
    "aim_requests_running": "Requests the engine is computing",
    "aim_requests_waiting": "Requests waiting for a slot",
    "aim_engine_slots": "Requests the engine can compute at once",
    "aim_kv_cache_usage_ratio": "Share of the KV cache in use, 0 to 1",
    "aim_engine_stalled_seconds": "Time the engine has had work without getting on with it",
}
