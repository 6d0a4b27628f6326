"""The spans of a request to an engine, as :mod:`aim_runtime.spans` tells them; imported with an endpoint only."""

from __future__ import annotations

import time

from prometheus_client import REGISTRY, CollectorRegistry

from aim_kserve.access import RequestLog
from aim_kserve.otlp import Phase, Spans
from aim_runtime.spans import Call, attributes, phases


class Tracer:
    """Makes the spans of requests that have ended, and sends them in the background.

    Args:
        url: where the collector takes traces, path and all.
        version: of the service; its name is ``aim-runtime`` where ``OTEL_SERVICE_NAME`` does not say otherwise.
        registry: for the count of lost spans.
    """

    def __init__(self, url: str, version: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._spans = Spans(url, "aim-runtime", version, registry)

    def record(self, log: RequestLog, call: Call) -> None:
        """The spans of one call, which has just ended. A V1 or V2 request with several prompts has one for each."""
        end_ns = time.time_ns()
        began_ns = end_ns - int(call.duration_s * 1e9)
        named = f"{call.kind} {call.asked_model}"
        span = Phase(named, began_ns, end_ns, attributes(call, log.request_id), call.status >= 500)
        parts = [Phase(name, began_ns + int(on * 1e9), began_ns + int(off * 1e9)) for name, on, off in phases(call)]
        self._spans.request(log, span, parts)

    def close(self) -> None:
        """Send what is left, for a moment at most: a process ends on time, collector or not."""
        self._spans.close()
