"""Prometheus metrics of the runtime: one set of families per process, and a view of it for every served model.

Counters and histograms are fed by the requests, the gauges by :meth:`Engine.stats` when Prometheus asks. Children are
looked up once per operation and status, so that a request costs a few dictionary look-ups and locks. A model that
leaves takes its children with it (:meth:`Metrics.remove`). docs/metrics.md lists every family.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter as Count
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, disable_created_metrics

from aim_kserve.access import current_log
from aim_kserve.identity import current_caller
from aim_runtime.engine_gauges import Device, EngineGauges, Watched
from aim_runtime.engines.base import Engine, Moments, Usage
from aim_runtime.spans import Call, SpanSink

Labels = tuple[str, str, str, str]
MODEL_LABELS = ("model_name", "engine", "variant", "adapter")
OPERATION_LABELS = (*MODEL_LABELS, "operation")
#: Seconds. Answers take 10 ms (a tokenisation) to minutes (a long answer on a small partition).
DURATION_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
#: Tenants whose tokens have a series of their own, the first that came; a token's subject may be anybody.
TENANTS_NAMED = 100
OTHER_TENANTS = "other"
#: Chunks of an OpenAI stream that carry no token: the role that opens a chat, the bare finish reason, the usage.
NO_TOKEN = re.compile(rb'"content":""|"text":""|"delta":\{\}|"choices":\[\]')


class Families:
    """Every metric family of the runtime, once in a registry; use :func:`families`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]

        def counter(name: str, text: str, labels: tuple[str, ...] = MODEL_LABELS) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(
            name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = MODEL_LABELS
        ) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self.requests = counter(
            "aim_requests", "Requests answered, by HTTP status (499: the client left)", (*OPERATION_LABELS, "status")
        )
        self.ignored = counter(
            "aim_ignored_fields",
            "Fields of request bodies that no operation knows and that were ignored (header x-ignored-fields)",
            OPERATION_LABELS,
        )
        self.duration = histogram(
            "aim_request_duration_seconds",
            "Time from a parsed request to its last token",
            DURATION_BUCKETS,
            OPERATION_LABELS,
        )
        self.first_token = histogram(
            "aim_time_to_first_token_seconds", "Time to the first token of a streamed answer", TTFT_BUCKETS
        )
        self.next_token = histogram(
            "aim_inter_token_latency_seconds", "Time between the chunks of a streamed answer", ITL_BUCKETS
        )
        self.prompt = counter("aim_prompt_tokens", "Tokens of prompts")
        self.generated = counter("aim_generation_tokens", "Tokens generated")
        self.cached = counter("aim_cached_prompt_tokens", "Prompt tokens found in the KV cache")
        self.tenant_tokens = counter(
            "aim_tenant_tokens",
            f"Tokens of prompts and generated, by who pays; those after the first {TENANTS_NAMED} are {OTHER_TENANTS}",
            (*MODEL_LABELS, "tenant", "kind"),
        )
        self._tenants: set[str] = set()
        self.engines = EngineGauges()
        registry.register(self.engines)
        self._views: Count[Labels] = Count()
        #: Who is told of every request that has ended; None: nobody traces.
        self.spans: SpanSink | None = None

    def tenant_label(self, tenant: str) -> str:
        """The tenant, or the word for those that came after the first so many."""
        if tenant not in self._tenants:
            if len(self._tenants) >= TENANTS_NAMED:
                return OTHER_TENANTS
            self._tenants.add(tenant)
        return tenant

    def join(self, labels: Labels) -> None:
        """One more view uses the children of ``labels``."""
        self._views[labels] += 1

    def leave(self, labels: Labels) -> None:
        """One less; the last one takes the children along."""
        self._views[labels] -= 1
        if self._views[labels]:  # the same model on its new device, after a migration
            return
        del self._views[labels]
        matching = dict(zip(MODEL_LABELS, labels, strict=True))
        for family in (
            *(self.requests, self.ignored, self.duration, self.first_token, self.next_token),
            *(self.prompt, self.generated, self.cached, self.tenant_tokens),
        ):
            family.remove_by_labels(matching)


F = TypeVar("F")


class OncePerRegistry(Generic[F]):
    """``make(registry)`` at the first call for a registry, the same again at every later one."""

    def __init__(self, make: Callable[[CollectorRegistry], F]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: WeakKeyDictionary[CollectorRegistry, F] = WeakKeyDictionary()

    def __call__(self, registry: CollectorRegistry = REGISTRY) -> F:
        with self._lock:
            found = self._made.get(registry)
            if found is None:
                found = self._made[registry] = self._make(registry)
            return found


families = OncePerRegistry(Families)


class RequestMetrics:
    """What requests to one model, or to one adapter of it, feed: the children of one set of labels."""

    def __init__(self, of: Families, labels: Labels) -> None:
        of.join(labels)
        self.model_name, self.engine, self.variant, self.adapter = labels
        self._families = of
        self._labels = labels
        self._removed = False
        self.first_token = of.first_token.labels(*labels)
        self.next_token = of.next_token.labels(*labels)
        self._prompt = of.prompt.labels(*labels)
        self._generated = of.generated.labels(*labels)
        self._cached = of.cached.labels(*labels)
        self._requests_by: dict[tuple[str, int], Counter] = {}
        self._duration_by: dict[str, Histogram] = {}

    @property
    def spans(self) -> SpanSink | None:
        return self._families.spans

    def finished(self, operation: str, status: int, duration_s: float, usage: Usage) -> None:
        """Count one request that has ended."""
        if self._removed:  # a last request of a model that has left must not bring its children back
            return
        key = (operation, status)
        requests = self._requests_by.get(key)
        if requests is None:
            requests = self._requests_by[key] = self._families.requests.labels(*self._labels, operation, str(status))
        requests.inc()
        duration = self._duration_by.get(operation)
        if duration is None:
            duration = self._duration_by[operation] = self._families.duration.labels(*self._labels, operation)
        duration.observe(duration_s)
        if usage.prompt_tokens:
            self._prompt.inc(usage.prompt_tokens)
        if usage.completion_tokens:
            self._generated.inc(usage.completion_tokens)
        if usage.cached_tokens:
            self._cached.inc(usage.cached_tokens)
        if (caller := current_caller()) is not None:
            self._paid_by(caller.tenant, usage)

    def _paid_by(self, tenant: str, usage: Usage) -> None:
        families, of = self._families, self._families.tenant_label(tenant)
        for kind, tokens in (("prompt", usage.prompt_tokens), ("generation", usage.completion_tokens)):
            if tokens:
                families.tenant_tokens.labels(*self._labels, of, kind).inc(tokens)

    def ignored(self, operation: str, count: int) -> None:
        """Count fields of a body that were ignored."""
        if not self._removed:
            self._families.ignored.labels(*self._labels, operation).inc(count)

    def remove(self) -> None:
        """Drop the children; a second call does nothing."""
        if not self._removed:
            self._removed = True
            self._families.leave(self._labels)


class Metrics(RequestMetrics):
    """All metrics of one served model.

    Two views with the same labels share their children (the old and the new place of a model that migrates): the last
    one to be removed takes them along.

    Args:
        model_name: label ``model_name``.
        engine: label ``engine`` is its name; its stats are read at scrape time.
        registry: where ``/metrics`` looks; tests give their own.
        variant: label ``variant``, of an A/B split; empty: there is none.
        devices: what the engine runs on, for ``aim_model_device_info``.
        gauges: False where ``engine`` is several engines behind one name: :meth:`watch` each of them.
    """

    def __init__(
        self,
        model_name: str,
        engine: Engine,
        registry: CollectorRegistry = REGISTRY,
        *,
        variant: str = "",
        devices: Sequence[Device] = (),
        gauges: bool = True,
    ) -> None:
        super().__init__(families(registry), (model_name, engine.name, variant, ""))
        self._adapters: dict[str, RequestMetrics] = {}
        self._watched: list[Watched] = []
        if gauges:
            self.watch(engine, devices=devices)

    def watch(self, engine: Engine, *, replica: str = "", devices: Sequence[Device] = ()) -> Watched:
        """Show the gauges of one more engine behind this name, told apart by ``replica``."""
        watched = Watched((self.model_name, engine.name, self.variant, replica), engine, tuple(devices))
        self._watched.append(watched)
        self._families.engines.add(watched)
        return watched

    def unwatch(self, watched: Watched) -> None:
        """That engine has gone; its gauges with it."""
        self._watched.remove(watched)
        self._families.engines.discard(watched)

    def for_adapter(self, name: str) -> RequestMetrics:
        """What requests to an adapter of this model feed. ``name`` is one the engine has, never what a client sent."""
        if not name:
            return self
        found = self._adapters.get(name)
        if found is None:
            found = self._adapters[name] = RequestMetrics(
                self._families, (self.model_name, self.engine, self.variant, name)
            )
        return found

    def remove_adapter(self, name: str) -> None:
        """The adapter has been unloaded."""
        adapter = self._adapters.pop(name, None)
        if adapter is not None:
            adapter.remove()

    def remove(self) -> None:
        """The model has left: its children, its adapters' and its engines' gauges go."""
        super().remove()
        for name in list(self._adapters):
            self.remove_adapter(name)
        for watched in list(self._watched):
            self.unwatch(watched)


class Meter:
    """One request's clock.

    Args:
        metrics: of the model, or of its adapter, that is asked.
        operation: URL suffix below ``/v1``.
        usage: filled in by the engine.
        body: of the request, for its span.
        moments: who else is told of a stream's first token.
    """

    __slots__ = ("_body", "_last", "_metrics", "_moments", "_operation", "_started", "_ttft_s", "_usage")

    def __init__(
        self,
        metrics: RequestMetrics,
        operation: str,
        usage: Usage,
        body: Mapping[str, Any] = MappingProxyType({}),
        moments: Moments | None = None,
    ) -> None:
        self._metrics = metrics
        self._operation = operation
        self._usage = usage
        self._body = body
        self._moments = moments
        self._started = time.perf_counter()
        self._last = 0.0
        self._ttft_s: float | None = None

    def end(self, status: int) -> None:
        """The request has ended: count it, and leave its figures in the access log and its span."""
        usage, metrics = self._usage, self._metrics
        duration_s = time.perf_counter() - self._started
        metrics.finished(self._operation, status, duration_s, usage)
        log = current_log()
        log.fields["model"] = metrics.model_name
        if metrics.variant:
            log.fields["variant"] = metrics.variant
        if metrics.adapter:
            log.fields["adapter"] = metrics.adapter
        if usage.prompt_tokens:
            log.add(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
        if usage.cached_tokens:
            log.add(cached_tokens=usage.cached_tokens)
        if self._ttft_s is not None:
            log.fields["ttft_ms"] = round(self._ttft_s * 1e3, 3)
        if metrics.spans is not None:
            metrics.spans.record(log, self._call(status, duration_s))

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
            if self._moments is not None:
                self._moments.first_token()
        self._last = now

    def _call(self, status: int, duration_s: float) -> Call:
        """A stream's tokens were seen here; a whole answer's first one is known where the engine tells."""
        usage, metrics = self._usage, self._metrics
        first_s, last_s = self._ttft_s, self._last - self._started if self._last else None
        if first_s is None and usage.queue_s is not None and usage.prefill_s is not None:
            first_s, last_s = usage.queue_s + usage.prefill_s, duration_s
        return Call(
            operation=self._operation,
            model_name=metrics.model_name,
            adapter=metrics.adapter,
            variant=metrics.variant,
            engine=metrics.engine,
            status=status,
            body=self._body,
            streamed=bool(self._body.get("stream")),
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            queue_s=usage.queue_s,
            first_token_s=first_s,
            last_token_s=last_s,
            duration_s=duration_s,
        )
