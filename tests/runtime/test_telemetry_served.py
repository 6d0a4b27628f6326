"""Spans, the trail of admin actions and Kubernetes' probes of the real server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry

from aim_kserve.errors import Unavailable
from aim_runtime.engines.base import RequestContext
from aim_runtime.memory_pools import Pool, Use
from aim_runtime.memory_watch import MemoryWatch
from aim_runtime.metrics import Metrics
from aim_runtime.model import RuntimeModel
from fake_engine import FakeEngine
from otlp_receiver import OtlpReceiver
from ports import free_ports
from served import Served

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "a=b"}
CHAT = {"messages": [{"role": "user", "content": "one two"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is missing: make test installs it")
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def served(receiver: OtlpReceiver) -> Iterator[Served]:
    with Served.fake("--otlp_endpoint", receiver.url) as server:
        yield server


def trail(file: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def test_probes_of_a_ready_server(served: Served) -> None:
    for path, text in {
        "/healthz": "ok",
        "/readyz": "ok",
        "/readyz/m": "ok",
        "/readyz?verbose": "[+]m ok\nreadyz check passed",
        "/readyz?exclude=m&verbose": "readyz check passed",
    }.items():
        answer = httpx.get(served.url + path)
        assert (answer.status_code, answer.text) == (200, text), path
    unknown = httpx.get(f"{served.url}/readyz/nobody")
    assert (unknown.status_code, unknown.text) == (404, "no model 'nobody' is served here; there are: m")


def test_a_stream_and_a_whole_answer_are_traced_and_successful_probes_are_not_logged(
    served: Served, receiver: OtlpReceiver
) -> None:
    httpx.get(f"{served.url}/readyz/m")
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json={**CHAT, "stream": True}, headers=HEADERS) as s:
        s.read()
    predicted = httpx.post(f"{served.url}/v1/models/m:predict", json={"instances": ["a", "b"]}, headers=HEADERS)
    assert predicted.status_code == 200
    spans = receiver.wait(5)
    chat, phases = [s for s in spans if s.name == "chat m"], [s for s in spans if "prefill" in s.name]
    (root,) = chat
    assert (root.trace_id, root.parent_id, root.trace_state) == (TRACE, CALLER, "a=b")
    assert root.attributes["gen_ai.request.stream"] is True
    assert root.attributes["gen_ai.request.max_tokens"] == 3
    assert root.attributes["gen_ai.usage.input_tokens"] == 2
    assert root.attributes["gen_ai.usage.output_tokens"] == 3
    assert [phase.name for phase in phases] == ["queue and prefill"]  # an engine that tells no more
    assert [span.name for span in spans if span.parent_id == root.span_id and span not in phases] == ["decode"]
    assert len([span for span in spans if span.name == "text_completion m"]) == 2
    assert [(line["audit"], line["model"]) for line in served.audit_lines()] == [("load", "m")]
    logged = {line["path"]: line for line in served.access_lines()}
    assert logged["/v1/chat/completions"]["span_id"] == root.span_id
    assert not [path for path, line in logged.items() if "ready" in path and line["status"] < 400]


@pytest.mark.model
def test_the_embedded_engine_tells_queue_prefill_and_decode_apart(embedded_model: Path, receiver: OtlpReceiver) -> None:
    before = len(receiver.spans)
    flags = ["--model_name", "smollm2", "--model_dir", str(embedded_model.parent), "--threads", "1"]
    flags += ["--max_model_len", "512", "--max_concurrency", "2", "--otlp_endpoint", receiver.url]
    with Served(["-m", "aim_runtime", *flags]) as server:
        for stream in (False, True):
            body = {"prompt": "Once upon a time", "max_tokens": 4, "stream": stream, "ignore_eos": True}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        server.terminate()
        assert server.exit_code() == 0
    spans = receiver.spans[before:]
    roots = [span for span in spans if span.name == "text_completion smollm2"]
    assert [root.attributes["gen_ai.request.stream"] for root in roots] == [False, True]
    for root in roots:
        inside = [span for span in spans if span.parent_id == root.span_id]
        assert [span.name for span in inside] == ["queue", "prefill", "decode"]
        queue, prefill, decode = inside
        assert root.start_ns == queue.start_ns <= queue.end_ns == prefill.start_ns < prefill.end_ns == decode.start_ns
        assert decode.start_ns < decode.end_ns <= root.end_ns


def test_who_loads_and_unloads_is_in_the_trail_and_states_are_shown(tmp_path: Path) -> None:
    audit_log = tmp_path / "audit.jsonl"
    with Served.fake_models("--audit_log", str(audit_log), models={"one": {}, "two": {}}) as served:
        assert [(line["audit"], line["outcome"], line["client"]) for line in trail(audit_log)] == [
            ("load", "ok", None),
            ("load", "ok", None),
        ]
        url = f"{served.url}/v2/repository/models/one"
        assert httpx.post(f"{url}/unload", headers={"x-request-id": "by-hand"}).status_code == 200
        unloaded = trail(audit_log)[-1]
        assert (unloaded["audit"], unloaded["model"], unloaded["outcome"]) == ("unload", "one", "ok")
        assert (unloaded["client"], unloaded["request_id"]) == ("127.0.0.1", "by-hand")
        assert httpx.get(f"{served.url}/readyz?verbose").text == "[+]two ok\nreadyz check passed"
        assert httpx.get(f"{served.url}/readyz/one").status_code == 404
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        assert {line for line in lines if line.startswith("aim_model_state{")} == {
            'aim_model_state{model_name="one",state="unavailable"} 1.0',
            'aim_model_state{model_name="two",state="ready"} 1.0',
        }
        assert not [line for line in lines if 'model_name="one"' in line and not line.startswith("aim_model_state{")]


def test_probes_of_a_server_that_is_not_ready() -> None:
    with Served.fake(load_s=600, wait=False) as served:
        served.wait_status("/healthz", 200)
        says = "model m is still loading: ask again"
        for path, text in {
            "/readyz": says,
            "/readyz/m": says,
            "/readyz?verbose": f"[-]m failed: {says}\nreadyz check failed",
        }.items():
            answer = httpx.get(served.url + path)
            assert (answer.status_code, answer.text, answer.headers["retry-after"]) == (503, text, "5"), path
        assert httpx.get(f"{served.url}/readyz?exclude=m").status_code == 200


def test_what_is_left_is_sent_at_the_end_and_a_collector_that_is_away_delays_no_end() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is missing: make test installs it")
    slow = {**os.environ, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    flags = Served.fake_arguments("--otlp_endpoint", "http://127.0.0.1:9")
    with OtlpReceiver() as receiver, Served([*flags[:-1], receiver.url], env=slow) as server:
        httpx.post(f"{server.url}/v1/chat/completions", json=CHAT)
        server.terminate()
        assert server.exit_code() == 0
        assert [span.name for span in receiver.spans] == ["chat m"]
    fast = {**os.environ, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with Served([*flags[:-1], f"http://127.0.0.1:{free_ports(1)[0]}"], env=fast) as server:
        for _ in range(3):
            assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT).status_code == 200
        server.terminate()
        assert server.exit_code() == 0


def test_a_trail_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with Served.fake("--audit_log", str(tmp_path / "missing/audit.jsonl"), wait=False) as server:
        assert server.exit_code() == 1
        assert server.stderr().splitlines()[-1].startswith("error: --audit_log /")


async def test_full_memory_refuses_new_requests_and_readiness_and_nothing_in_flight() -> None:
    used = 10
    watch, registry = MemoryWatch(CollectorRegistry()), CollectorRegistry()
    pool = Pool("card 0", "card", lambda: Use(used, 100), card="0")
    engine = FakeEngine("m")
    model = RuntimeModel("m", engine, Metrics("m", engine, registry), gate=watch.gate([], pool))
    await model.load_async()
    stream = await model.call("completions", {"prompt": "a", "stream": True, "max_tokens": 3}, RequestContext("r"))
    used = 99
    watch.read()
    assert model.refusal() is not None
    assert model.alive()
    with pytest.raises(Unavailable, match="memory of card 0 is full") as refused:
        await model.call("completions", {"prompt": "a"}, RequestContext("s"))
    assert refused.value.code == "memory_full"
    assert len([chunk async for chunk in stream]) == 4
    used = 50
    watch.read()
    assert await model.call("completions", {"prompt": "a"}, RequestContext("t"))
    assert watch.known()
    await model.close()
    assert watch.known() == []
