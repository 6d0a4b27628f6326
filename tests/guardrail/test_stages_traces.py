"""Spans as a collector receives them: client → guardrail → predictor, and one for each detector."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fake_predictor import FakePredictor
from guarded import ask
from otlp_receiver import OtlpReceiver
from scripted_guardrail import CHAT, Guarded, serving

pytest.importorskip("aim_kserve.otlp", reason="OpenTelemetry is missing: make test installs it")

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
POLICY = """
budget_ms: 20000
prompt:
  - parallel:
      - {type: scripted, id: near, options: {name: near}, action: block}
      - {type: scripted, id: far, options: {name: far, cost: remote}, action: block, on_error: open}
answer:
  - {type: scripted, id: late, options: {name: late}, action: flag}
"""


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def guarded(
    predictor: FakePredictor, receiver: OtlpReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Guarded]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with serving(POLICY, tmp_path, predictor.host, "--otlp_endpoint", receiver.url) as guarded:
        yield guarded


def sent_on(predictor: FakePredictor) -> str:
    return str(dict(predictor.last["headers"])["traceparent"])


def test_client_guardrail_predictor_and_each_detector(
    guarded: Guarded, predictor: FakePredictor, receiver: OtlpReceiver
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "congo=1", "x-request-id": "r-1"}
    answer = httpx.post(f"{guarded.server.url}{CHAT}", json=ask("far=fail late=bad"), headers=headers, timeout=30)
    assert answer.status_code == 200
    spans = {span.name: span for span in receiver.wait(4)}
    root = spans.pop("guardrail chat m")
    assert (root.trace_id, root.parent_id, root.trace_state, root.is_error) == (TRACE, CALLER, "congo=1", False)
    assert sent_on(predictor) == f"00-{TRACE}-{root.span_id}-01"
    assert root.service["service.name"] == "aim-guardrail"
    seconds = {name for name in root.attributes if name.endswith("check_seconds")}
    assert all(0 < root.attributes.pop(name) < 20 for name in seconds)
    assert root.attributes.pop("guardrail.policy").startswith("p/")
    assert root.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 7,
        "aim.request_id": "r-1",
        "guardrail.prompt.outcome": "allowed",
        "guardrail.answer.outcome": "flagged",
        "guardrail.answer.families": "scripted",
    }
    assert {name: (span.attributes["guardrail.result"], span.is_error) for name, span in spans.items()} == {
        "detector near": ("allowed", False),
        "detector far": ("error", True),
        "detector late": ("flagged", False),
    }
    assert {(span.parent_id, span.trace_id) for span in spans.values()} == {(root.span_id, TRACE)}
    assert all(root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns for span in spans.values())
    assert spans["detector late"].attributes == {
        "guardrail.detector": "late",
        "guardrail.family": "scripted",
        "guardrail.direction": "answer",
        "guardrail.result": "flagged",
    }


def test_a_trace_that_starts_here_is_sampled_and_a_callers_decision_holds(
    guarded: Guarded, predictor: FakePredictor, receiver: OtlpReceiver
) -> None:
    unsampled = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    httpx.post(f"{guarded.server.url}{CHAT}", json=ask("hi"), headers=unsampled, timeout=30)
    assert sent_on(predictor).endswith("-00")
    assert guarded("near=bad far=sleep:15").status_code == 400
    blocked = receiver.wait(3)
    assert guarded("hi").status_code == 200
    assert sent_on(predictor).endswith("-01")
    assert {span.name for span in blocked} == {"guardrail chat m", "detector near", "detector far"}
    (root,) = [span for span in blocked if span.name == "guardrail chat m"]
    assert (root.parent_id, root.attributes["guardrail.prompt.outcome"]) == ("", "blocked")
    assert {span.attributes.get("guardrail.result") for span in blocked} == {None, "blocked", "skipped_early_stop"}
    assert TRACE not in {span.trace_id for span in receiver.wait(6)}


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (CHAT, ask("one two", stream=True, stream_options={"include_usage": True}), (5, 2)),
        (CHAT, ask("one two", stream=True), (None, None)),
        ("/v1/embeddings", {"model": "m", "input": "one"}, (3, 0)),
        ("/v1/messages", ask("one", max_tokens=9, stream=True), (5, 7)),
    ],
)
def test_tokens_are_told_where_the_predictor_tells_them(
    guarded: Guarded, receiver: OtlpReceiver, path: str, body: dict[str, Any], told: tuple[int | None, int | None]
) -> None:
    assert httpx.post(f"{guarded.server.url}{path}", json=body, timeout=30).status_code == 200
    (root,) = [span for span in receiver.wait(3) if span.name.startswith("guardrail ")]
    found = tuple(root.attributes.get(f"gen_ai.usage.{name}") for name in ("input_tokens", "output_tokens"))
    assert found == told


def test_what_is_asked_is_in_no_span(guarded: Guarded, receiver: OtlpReceiver) -> None:
    guarded("near=fail somebody's secret")
    assert "secret" not in str(receiver.wait(2))


def test_without_an_endpoint_nothing_is_imported() -> None:
    run = (
        "import sys, aim_guardrail.server, aim_guardrail.tracing\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    said = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
