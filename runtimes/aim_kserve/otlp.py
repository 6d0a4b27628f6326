"""Spans of requests that have ended, sent by OTLP: the only file that imports OpenTelemetry, and only with an endpoint.

A span is made when its request has ended, from what is known of it then: nothing is added to a request on its way.
A collector that is away costs spans, counted in ``aim_trace_spans_lost_total``, and never a request: a thread of its
own sends, from a queue that is bounded (``OTEL_BSP_*`` say how).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from prometheus_client import REGISTRY, CollectorRegistry, Counter

from aim_kserve.access import RequestLog

logger = logging.getLogger("aim.tracing")

ENDING_S = 2.0

Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class Phase:
    """A span within a request's; times in nanoseconds since 1970."""

    name: str
    began_ns: int
    ended_ns: int
    attributes: Attributes = field(default_factory=dict)
    is_error: bool = False


class Spans:
    """Makes the spans of requests that have ended, and sends them in the background. For one thread.

    Args:
        url: where the collector takes traces, path and all.
        service: its name where ``OTEL_SERVICE_NAME`` does not say otherwise.
        version: of the service.
        registry: for the count of lost spans.
    """

    def __init__(self, url: str, service: str, version: str, registry: CollectorRegistry = REGISTRY) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it would tell of each batch that is lost
        names = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: service}
        self._ids = _Ids()
        self._provider = TracerProvider(
            resource=Resource.create({**names, SERVICE_VERSION: version}),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(CountingExporter(url, registry)))
        self._tracer = self._provider.get_tracer(service.replace("-", "_"), version)
        logger.info("spans go to %s", url)

    def begin(self, log: RequestLog) -> None:
        """Decide, of a trace that starts here, whether it is sampled: whoever is asked next is told."""
        if log.parent_id is None:
            decided = self._provider.sampler.should_sample(Context(), int(log.trace_id, 16), "").decision
            log.flags = "01" if decided is Decision.RECORD_AND_SAMPLE else "00"

    def request(self, log: RequestLog, span: Phase, phases: Iterable[Phase] = ()) -> None:
        """The spans of a request that has ended, or of one of several parts of it, which stand beside one another. The
        first has the span id of the access log's line."""
        log.spans += 1
        self._ids.expect(log.trace_id, log.span_id if log.spans == 1 else None)
        made = self._tracer.start_span(
            span.name,
            context=_parent(log),
            kind=SpanKind.SERVER,
            attributes=dict(span.attributes),
            start_time=span.began_ns,
        )
        if span.is_error:
            made.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(made, Context())
        for phase in phases:
            within = self._tracer.start_span(
                phase.name, context=inside, attributes=dict(phase.attributes), start_time=phase.began_ns
            )
            if phase.is_error:
                within.set_status(Status(StatusCode.ERROR))
            within.end(phase.ended_ns)
        made.end(span.ended_ns)

    def close(self) -> None:
        """Send what is left, for at most ENDING_S: a process ends on time, collector or not."""
        ending = threading.Thread(target=self._provider.shutdown, name="otel-shutdown", daemon=True)
        ending.start()
        ending.join(ENDING_S)


def _parent(log: RequestLog) -> Context:
    """The caller's span; an empty context where the trace starts here."""
    if log.parent_id is None:
        return Context()
    caller = SpanContext(
        int(log.trace_id, 16),
        int(log.parent_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(log.flags, 16)),
        trace_state=TraceState.from_header([log.tracestate]),
    )
    return set_span_in_context(NonRecordingSpan(caller), Context())


class _Ids(RandomIdGenerator):
    """The access log's ids for the span that comes next, random ones for all others. For one thread."""

    def __init__(self) -> None:
        self._trace_id: int | None = None
        self._span_id: int | None = None

    def expect(self, trace_id: str, span_id: str | None) -> None:
        self._trace_id = int(trace_id, 16)
        self._span_id = None if span_id is None else int(span_id, 16)

    def generate_trace_id(self) -> int:
        return self._trace_id or super().generate_trace_id()

    def generate_span_id(self) -> int:
        expected, self._span_id = self._span_id, None
        return expected or super().generate_span_id()


class CountingExporter(SpanExporter):
    """OTLP over HTTP; loss is counted, and told of when it begins and when it ends."""

    def __init__(self, url: str, registry: CollectorRegistry) -> None:
        self._url = url
        self._otlp = OTLPSpanExporter(url)
        self._lost = Counter(
            "aim_trace_spans_lost",
            "Spans that the collector did not take: it is away, or refuses them",
            registry=registry,
        )
        self._losing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._otlp.export(spans)
        losing = result is not SpanExportResult.SUCCESS
        if losing:
            self._lost.inc(len(spans))
        if losing and not self._losing:
            logger.warning("the collector at %s takes no spans: they are lost until it does", self._url)
        elif self._losing and not losing:
            logger.info("the collector at %s takes spans again", self._url)
        self._losing = losing
        return result

    def shutdown(self) -> None:
        self._otlp.shutdown()  # type: ignore[no-untyped-call]
