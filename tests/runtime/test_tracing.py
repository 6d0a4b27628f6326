"""Spans as a collector receives them: names, parents, times, and what happens where there is no collector."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client import CollectorRegistry

from aim_kserve.access import open_log
from aim_kserve.otlp_endpoint import endpoint
from aim_runtime.engines.base import Usage
from aim_runtime.metrics import Meter, Metrics, families
from aim_runtime.spans import Call, phases
from fake_engine import FakeEngine
from otlp_receiver import OtlpReceiver, ReceivedSpan

otlp = pytest.importorskip("aim_kserve.otlp", reason="OpenTelemetry is missing: make test installs it")
tracing = pytest.importorskip("aim_runtime.tracing", reason="OpenTelemetry is missing: make test installs it")

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLED = [
    (b"traceparent", f"00-{TRACE}-{CALLER}-01".encode()),
    (b"tracestate", b"congo=t61rcWkgMzE"),
    (b"tracestate", b"rojo=00f067aa0ba902b7"),
    (b"x-request-id", b"r-1"),
]
SERVER = 2  # SpanKind of OTLP
TOKEN = b'{"choices":[{"text":"a"}]}'


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics("m", FakeEngine("m"), registry, variant="b")


@contextmanager
def traced(metrics: Metrics, registry: CollectorRegistry, url: str) -> Iterator[None]:
    """Spans of ``metrics`` go to ``url``, all of them at the end."""
    tracer = families(registry).spans = tracing.Tracer(f"{url}/v1/traces", "1.2.3", registry)
    yield
    tracer.close()


def by_name(spans: list[ReceivedSpan]) -> dict[str, ReceivedSpan]:
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def test_a_streams_span_and_phases(receiver: OtlpReceiver, metrics: Metrics, registry: CollectorRegistry) -> None:
    usage, before = Usage(), time.time_ns()
    with traced(metrics, registry, receiver.url):
        log = open_log(CALLED)
        body = {"stream": True, "max_tokens": 7, "temperature": 0.5, "seed": True, "n": "many", "messages": ["secret"]}
        meter = Meter(metrics.for_adapter("french"), "chat/completions", usage, body)
        usage.prompt_tokens, usage.queue_s = 3, 0.002
        for _ in range(2):
            time.sleep(0.005)
            meter.tick(TOKEN)
        usage.completion_tokens, usage.cached_tokens = 2, 1
        meter.end(200)
    assert receiver.requests == [("/v1/traces", "application/x-protobuf")]
    spans = by_name(receiver.spans)
    root = spans["chat french"]
    assert (root.trace_id, root.parent_id, root.span_id) == (TRACE, CALLER, log.span_id)
    assert root.trace_state == "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"
    assert (root.kind, root.is_error) == (SERVER, False)
    first_s = root.attributes.pop("gen_ai.response.time_to_first_chunk")
    assert 0.005 <= first_s < (root.end_ns - root.start_ns) / 1e9
    assert root.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "fake",
        "gen_ai.request.model": "french",
        "gen_ai.response.model": "french",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "http.response.status_code": 200,
        "aim.request_id": "r-1",
        "aim.variant": "b",
        "aim.adapter": "french",
    }
    assert root.service["service.name"] == "aim-runtime"
    assert root.service["service.version"] == "1.2.3"
    queue, prefill, decode = spans["queue"], spans["prefill"], spans["decode"]
    assert {span.parent_id for span in (queue, prefill, decode)} == {root.span_id}
    assert {span.trace_id for span in (queue, prefill, decode)} == {TRACE}
    assert before <= root.start_ns == queue.start_ns
    assert queue.end_ns == prefill.start_ns == root.start_ns + 2_000_000
    assert prefill.end_ns == decode.start_ns
    assert decode.end_ns <= root.end_ns <= time.time_ns()
    assert decode.end_ns - decode.start_ns >= 4_000_000


def test_a_trace_that_starts_here_has_the_access_logs_ids(
    receiver: OtlpReceiver, metrics: Metrics, registry: CollectorRegistry
) -> None:
    with traced(metrics, registry, receiver.url):
        log = open_log([(b"tracestate", b"nobody=1")])
        for _ in range(2):  # two prompts of one V1 request
            Meter(metrics, "completions", Usage()).end(200)
    first, second = receiver.spans
    assert (first.trace_id, first.span_id, first.parent_id) == (log.trace_id, log.span_id, "")
    assert first.trace_state == ""
    assert second.trace_id == log.trace_id
    assert second.span_id != log.span_id
    assert first.name == second.name == "text_completion m"


def test_failures_are_marked_and_have_no_phases_that_nobody_saw(
    receiver: OtlpReceiver, metrics: Metrics, registry: CollectorRegistry
) -> None:
    with traced(metrics, registry, receiver.url):
        for status in (503, 400, 499):
            open_log(CALLED)
            Meter(metrics, "tokenize", Usage()).end(status)
    assert [(span.name, span.is_error, span.attributes["error.type"]) for span in receiver.spans] == [
        ("tokenize m", True, "503"),
        ("tokenize m", False, "400"),
        ("tokenize m", False, "499"),
    ]


def test_a_callers_decision_not_to_sample_holds(
    receiver: OtlpReceiver, metrics: Metrics, registry: CollectorRegistry
) -> None:
    with traced(metrics, registry, receiver.url):
        open_log([(b"traceparent", f"00-{TRACE}-{CALLER}-00".encode())])
        Meter(metrics, "completions", Usage()).end(200)
    assert receiver.spans == []


def call(**known: float | None) -> Call:
    times: dict[str, float | None] = {"queue_s": None, "first_token_s": None, "last_token_s": None, **known}
    return Call("completions", "m", "", "", "fake", 200, {}, False, 1, 1, 0, duration_s=3.0, **times)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (call(), []),
        (call(queue_s=1.0), [("queue", 0, 1)]),  # aborted, or never decoded
        (call(first_token_s=2.0), [("queue and prefill", 0, 2)]),
        (call(first_token_s=2.0, last_token_s=3.0), [("queue and prefill", 0, 2), ("decode", 2, 3)]),
        (
            call(queue_s=1.0, first_token_s=2.0, last_token_s=3.0),
            [("queue", 0, 1), ("prefill", 1, 2), ("decode", 2, 3)],
        ),
        (call(queue_s=2.0, first_token_s=1.0), [("queue", 0, 2), ("prefill", 2, 2)]),  # clocks of two processes
    ],
)
def test_phases_say_no_more_than_is_known(known: Call, expected: list[tuple[str, float, float]]) -> None:
    assert phases(known) == expected


def test_a_whole_answers_phases_are_the_engines_word(
    receiver: OtlpReceiver, metrics: Metrics, registry: CollectorRegistry
) -> None:
    with traced(metrics, registry, receiver.url):
        open_log(CALLED)
        meter = Meter(metrics, "completions", Usage(queue_s=0.001, prefill_s=0.002))
        time.sleep(0.005)
        meter.end(200)
    spans = by_name(receiver.spans)
    prefill, decode, root = spans["prefill"], spans["decode"], spans["text_completion m"]
    assert prefill.end_ns - prefill.start_ns == pytest.approx(2_000_000, abs=1000)
    assert decode.end_ns == pytest.approx(root.end_ns, abs=1000)
    assert "gen_ai.response.time_to_first_chunk" not in root.attributes


@pytest.mark.parametrize("status", [None, 400])
def test_a_collector_that_is_away_costs_spans_and_nothing_else(
    status: int | None, metrics: Metrics, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """``status`` None: nobody listens."""
    with OtlpReceiver(status=status or 200) as receiver:
        url = receiver.url
        if status is None:
            receiver.__exit__(None, None, None)
        started = time.perf_counter()
        tracer = families(registry).spans = tracing.Tracer(f"{url}/v1/traces", "1", registry)
        for _ in range(3000):  # more than the queue holds
            Meter(metrics, "completions", Usage()).end(200)
        tracer.close()
        assert time.perf_counter() - started < 30
    if status is not None:  # who does not answer at all is asked again, beyond the process's end
        assert registry.get_sample_value("aim_trace_spans_lost_total")
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) <= 1
    assert all(record.name == "aim.tracing" for record in warnings)


def test_loss_is_told_when_it_begins_and_when_it_ends(
    receiver: OtlpReceiver, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    exporter = otlp.CountingExporter(f"{receiver.url}/v1/traces", registry)
    for status in (400, 400, 200, 200):
        receiver.status = status
        exporter.export(())
    said = [record.getMessage() for record in caplog.records if record.name == "aim.tracing"]
    assert said == [
        f"the collector at {receiver.url}/v1/traces takes no spans: they are lost until it does",
        f"the collector at {receiver.url}/v1/traces takes spans again",
    ]


@pytest.mark.parametrize(
    ("flag", "env", "url"),
    [
        (None, {}, None),
        ("", {}, None),
        ("http://c:4318", {}, "http://c:4318/v1/traces"),
        ("http://c:4318/", {}, "http://c:4318/v1/traces"),
        ("http://c:4318/v1/traces", {}, "http://c:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x"}, "http://c/x"),
        (
            None,
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://d"},
            "http://c/x",
        ),
        ("http://f", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x"}, "http://f/v1/traces"),
        ("http://f", {"OTEL_SDK_DISABLED": "true"}, None),
        ("http://f", {"OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_endpoint(flag: str | None, env: dict[str, str], url: str | None) -> None:
    assert endpoint(flag, env) == url


def test_without_an_endpoint_nothing_is_imported() -> None:
    run = "import sys, aim_runtime.server\nprint([name for name in sys.modules if name.startswith('opentelemetry')])"
    said = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
