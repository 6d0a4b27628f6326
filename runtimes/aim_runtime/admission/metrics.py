"""Service levels in ``/metrics``: who waits, who was refused and why, what was promised and kept.

Counters are fed where something is refused or predicted, never by a request that is served at once; what stands in a
queue is asked at each scrape. Tenants are bounded: those that wait most are named, the rest are ``other``.
"""

from __future__ import annotations

import threading
from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from aim_kserve.errors import ServingError
from aim_kserve.identity import QosClass
from aim_runtime.admission.queue import Place, Queue
from aim_runtime.engines.base import Usage
from aim_runtime.metrics import OncePerRegistry
from aim_runtime.qos.request import CLASSES, Reason
from aim_runtime.qos.slo import WINDOWS, Slo, Window
from aim_runtime.qos.ticket import Ticket

#: How a request ended: with a whole answer; ``failed``, which is the server's fault; ``left``: its client's.
Outcome = Literal["whole", "failed", "left"]
#: Reasons that are the server's: it promised, and has no room.
_BROKEN_PROMISES = frozenset({"queue_full", "deadline", "throttled"})

#: Tenants that have a series of their own, of those that wait.
TENANTS_AT_MOST = 20
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 4, 8)
OTHER = "other"


class Families(Collector):
    """Every family of service levels, once in a registry; use :func:`families`. Thread-safe: a scrape may meet a load
    or an unload."""

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.rejected = Counter(
            "aim_qos_rejections",
            "Requests refused because of service levels, by reason",
            ("model_name", "class", "reason"),
            registry=registry,
        )
        self.ratio = Histogram(
            "aim_qos_ttft_prediction_ratio",
            "Time from a stream's arrival to its first token over what was predicted with 90 % certainty",
            ("model_name", "class"),
            buckets=RATIO_BUCKETS,
            registry=registry,
        )
        self._lock = threading.Lock()
        self._queues: list[tuple[str, Queue]] = []
        self._slos: dict[str, Slo] = {}
        registry.register(self)

    def add(self, model: str, queue: Queue, slo: Slo) -> None:
        with self._lock:
            self._queues.append((model, queue))
            self._slos[model] = slo

    def discard(self, model: str, queue: Queue) -> None:
        """The last one of a model takes its counters along."""
        with self._lock:
            self._queues.remove((model, queue))
            left = any(name == model for name, _ in self._queues)
            if not left:
                del self._slos[model]
        if not left:
            for family in (self.rejected, self.ratio):
                family.remove_by_labels({"model_name": model})

    def describe(self) -> Iterator[Metric]:
        for name, text in (_WAITING, _RUNNING, _SLOTS, _KV_TOKENS, _ATTAINMENT, _BURN, _THROTTLED, _CALIBRATION):
            yield GaugeMetricFamily(name, text)
        yield CounterMetricFamily(*_REPLAYS)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            queues, slos = list(self._queues), dict(self._slos)
        if not queues:
            return
        yield _gauge(_WAITING, ("model_name", "class", "tenant"), _waiting(queues))
        yield _gauge(_RUNNING, ("model_name", "class"), _running(queues))
        ledgers = [(model, queue.scheduler.ledger) for model, queue in queues]
        yield _gauge(_SLOTS, ("model_name",), _sums(((model,), each.slots_used) for model, each in ledgers))
        yield _gauge(_KV_TOKENS, ("model_name",), _sums(((model,), each.kv_used) for model, each in ledgers))
        for name, of in ((_ATTAINMENT, Slo.attainment), (_BURN, Slo.burn)):
            yield _gauge(name, ("model_name", "class", "window"), dict(_windows(slos, of)))
        yield _gauge(_THROTTLED, ("model_name", "class"), dict(_throttled(slos)))
        yield _gauge(_CALIBRATION, ("model_name",), _calibration(queues))
        replays = CounterMetricFamily(*_REPLAYS, labels=("model_name",))
        for (model,), count in _sums(((model,), queue.replayed) for model, queue in queues).items():
            replays.add_metric((model,), count)
        yield replays


_WAITING = ("aim_qos_waiting", "Requests that wait for their turn")
_RUNNING = ("aim_qos_running", "Requests that have had their turn and have not ended")
_SLOTS = ("aim_qos_slots", "Answers that requests which have had their turn take of the engine's slots; without any, 0")
_KV_TOKENS = ("aim_qos_kv_tokens", "KV tokens set aside for requests that have had their turn; without any, 0")
_ATTAINMENT = ("aim_slo_attainment_ratio", "Share of requests that kept the promise to their class, over a window")
_BURN = ("aim_slo_burn_rate", "How many times faster than it may a class uses up its error budget, over a window")
_THROTTLED = ("aim_qos_throttled", "1 while a class is held back because one above burns its error budget")
_CALIBRATION = (
    "aim_qos_ttft_calibration_ratio",
    "Share of the last streams whose first token came within what was predicted with 90 % certainty: 0.9 is right",
)
_REPLAYS = ("aim_qos_replays", "Calls aborted before their first byte for a more urgent one, and made again")


def _gauge(name: tuple[str, str], labels: tuple[str, ...], rows: Mapping[tuple[str, ...], float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(*name, labels=labels)
    for row, value in rows.items():
        family.add_metric(row, value)
    return family


def _waiting(queues: Iterable[tuple[str, Queue]]) -> Mapping[tuple[str, ...], float]:
    rows: Count[tuple[str, str, str]] = Count()
    tenants: Count[str] = Count()
    for model, queue in queues:
        for (qos_class, tenant), count in queue.scheduler.waiting().items():
            rows[model, qos_class, tenant] += count
            tenants[tenant] += count
    named = {tenant for tenant, _ in tenants.most_common(TENANTS_AT_MOST)}
    return _sums(
        ((model, qos_class, tenant if tenant in named else OTHER), count)
        for (model, qos_class, tenant), count in rows.items()
    )


def _running(queues: Iterable[tuple[str, Queue]]) -> Mapping[tuple[str, ...], float]:
    return _sums(((model, ticket.ask.qos_class), 1) for model, queue in queues for ticket in queue.scheduler.running())


def _windows(
    slos: Mapping[str, Slo], of: Callable[[Slo, QosClass, Window], float | None]
) -> Iterator[tuple[tuple[str, ...], float]]:
    for model, slo in slos.items():
        for qos_class in CLASSES:
            for window in WINDOWS:
                if (value := of(slo, qos_class, window)) is not None:
                    yield (model, qos_class, window), value


def _throttled(slos: Mapping[str, Slo]) -> Iterator[tuple[tuple[str, ...], float]]:
    for model, slo in slos.items():
        for qos_class in CLASSES:
            yield (model, qos_class), float(slo.throttled(qos_class))


def _calibration(queues: Iterable[tuple[str, Queue]]) -> Mapping[tuple[str, ...], float]:
    """Of several engines of a model together."""
    within: dict[str, list[float]] = {}
    for model, queue in queues:
        share = queue.scheduler.ttft.calibration().within_q90
        if share is not None:
            within.setdefault(model, []).append(share)
    return {(model,): sum(shares) / len(shares) for model, shares in within.items()}


def _sums(rows: Iterable[tuple[tuple[str, ...], float]]) -> Mapping[tuple[str, ...], float]:
    sums: dict[tuple[str, ...], float] = {}
    for labels, value in rows:
        sums[labels] = sums.get(labels, 0) + value
    return sums


families = OncePerRegistry(Families)


def outcome_of(error: BaseException) -> Outcome:
    """Of a request that ended so."""
    if isinstance(error, ServingError):
        return "failed" if error.status >= 500 else "left"
    return "failed" if isinstance(error, Exception) else "left"


def _first_token_s(ticket: Ticket, usage: Usage) -> float:
    """Of an answer that was not streamed, from its arrival: at least so long, as far as the engine tells."""
    waited_s = (ticket.dispatched_s or ticket.arrived_s) - ticket.arrived_s
    return waited_s + (usage.queue_s or 0.0) + (usage.prefill_s or 0.0)


class ClassMeters:
    """What the queues of one model feed.

    Args:
        model: its served name.
        slo: its promises, and how they are kept.
    """

    def __init__(self, model: str, slo: Slo, registry: CollectorRegistry = REGISTRY) -> None:
        self._model, self._slo = model, slo
        self._families = families(registry)
        self._promised = frozenset(name for name in CLASSES if slo.promised_s(name) is not None)
        self._ratio_by: dict[QosClass, Histogram] = {}

    def watch(self, queue: Queue) -> None:
        self._families.add(self._model, queue, self._slo)

    def unwatch(self, queue: Queue) -> None:
        self._families.discard(self._model, queue)

    def rejected(self, qos_class: QosClass, reason: Reason, wanted_s: float | None) -> None:
        """wanted_s: its deadline. One that is tighter than the class's was not promised: a caller could burn the budget
        of all by it, and have others held back."""
        self._families.rejected.labels(self._model, qos_class, reason).inc()
        promised_s = self._slo.promised_s(qos_class)
        kept = reason == "deadline" and wanted_s is not None and promised_s is not None and wanted_s < promised_s
        if reason in _BROKEN_PROMISES and not kept:
            self._slo.observe(qos_class, None, ok=False)

    def left(self, place: Place, outcome: Outcome) -> None:
        """A request has ended. Of one whose client left before its first token nobody knows what would have been."""
        ticket = place.ticket
        qos_class = ticket.ask.qos_class
        if ticket.rejected is not None:
            self.rejected(qos_class, ticket.rejected.reason, ticket.ask.ttft_slo_s)
        elif outcome == "failed":
            self._slo.observe(qos_class, None, ok=False)
        elif ticket.first_token_s is not None:
            ttft_s = ticket.first_token_s - ticket.arrived_s
            self._slo.observe(qos_class, ttft_s, ok=True)
            if ticket.prediction is not None:
                self._ratio(qos_class).observe(ttft_s / ticket.prediction.q90_s)
        elif outcome == "whole" and qos_class in self._promised:
            self._slo.observe(qos_class, _first_token_s(ticket, place.usage), ok=True)

    def _ratio(self, qos_class: QosClass) -> Histogram:
        found = self._ratio_by.get(qos_class)
        if found is None:
            found = self._ratio_by[qos_class] = self._families.ratio.labels(self._model, qos_class)
        return found
