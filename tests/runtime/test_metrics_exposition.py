"""What Prometheus reads: names, labels and values; checked by promtool where there is one."""

from __future__ import annotations

import shutil
import subprocess

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from aim_runtime.engines.base import Usage
from aim_runtime.metrics import NO_TOKEN, Meter, Metrics
from fake_engine import FakeEngine
from served import Served

ASK = [{"role": "user", "content": "one two"}]
LABELS = {"model_name": "m", "engine": "fake"}


def scrape(server: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = httpx.get(f"{server.url}/metrics").text
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value for item in families for sample in item.samples
    }


def value(samples: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return samples.get((name, frozenset({**LABELS, **labels}.items())), 0.0)


def test_requests_and_tokens_are_counted(fake: Served) -> None:
    before = scrape(fake)
    body = {"model": "m", "messages": ASK, "max_tokens": 5}
    httpx.post(f"{fake.url}/v1/chat/completions", json=body)
    httpx.post(f"{fake.url}/v1/chat/completions", json={**body, "stream": True})
    httpx.post(f"{fake.url}/v1/chat/completions", json={**body, "temperature": -1})
    httpx.post(f"{fake.url}/v1/models/m:predict", json={"instances": ["a", "b"], "parameters": {"max_tokens": 1}})
    after = scrape(fake)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("aim_requests_total", operation="chat/completions", status="200") == 2
    assert grown("aim_requests_total", operation="chat/completions", status="400") == 1
    assert grown("aim_requests_total", operation="completions", status="200") == 2
    assert grown("aim_request_duration_seconds_count", operation="chat/completions") == 3
    assert grown("aim_prompt_tokens_total") == 2 + 2 + 2 + 1 + 1
    assert grown("aim_generation_tokens_total") == 5 + 5 + 1 + 1
    assert grown("aim_time_to_first_token_seconds_count") == 1
    assert grown("aim_inter_token_latency_seconds_count") == 4


def test_gauges_show_what_the_engine_is_doing(fake: Served) -> None:
    body = {"messages": ASK, "stream": True, "max_tokens": 1000, "fake": {"token_s": 0.01}}
    with httpx.stream("POST", f"{fake.url}/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        samples = scrape(fake)
    assert value(samples, "aim_requests_running") == 1
    assert value(samples, "aim_requests_waiting") == 0
    assert value(samples, "aim_engine_slots") == 8
    assert value(samples, "aim_kv_cache_usage_ratio") == 0.25


def test_names(fake: Served) -> None:
    types = [line.split() for line in exposition(fake).splitlines() if line.startswith("# TYPE")]
    assert {name: kind for _, _, name, kind in types} == {
        "aim_requests_total": "counter",
        "aim_request_duration_seconds": "histogram",
        "aim_time_to_first_token_seconds": "histogram",
        "aim_inter_token_latency_seconds": "histogram",
        "aim_ignored_fields_total": "counter",
        "aim_prompt_tokens_total": "counter",
        "aim_generation_tokens_total": "counter",
        "aim_cached_prompt_tokens_total": "counter",
        "aim_requests_running": "gauge",
        "aim_requests_waiting": "gauge",
        "aim_engine_slots": "gauge",
        "aim_kv_cache_usage_ratio": "gauge",
    }


@pytest.mark.system
def test_promtool_finds_nothing_to_say(fake: Served) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: make system-deps")
    check = subprocess.run(
        [promtool, "check", "metrics"], input=exposition(fake), text=True, capture_output=True, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def exposition(server: Served) -> str:
    """Our part of ``/metrics``."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    ours = [line for line in lines if line.startswith(("aim_", "# HELP aim_", "# TYPE aim_"))]
    return "\n".join(ours) + "\n"


@pytest.mark.parametrize(
    ("chunk", "carries"),
    [
        (b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}', False),
        (b'{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}', True),
        (b'{"choices":[{"index":0,"delta":{"content":"\\"content\\":\\"\\""}}]}', True),
        (b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}', False),
        (b'{"choices":[],"usage":{"prompt_tokens":1}}', False),
        (b'{"choices":[{"index":0,"text":"a"}]}', True),
        (b'event: response.output_text.delta\ndata: {"delta":"a"}', True),
    ],
)
def test_chunks_without_a_token_are_not_timed(chunk: bytes, carries: bool) -> None:
    assert (NO_TOKEN.search(chunk) is None) is carries


def test_cached_tokens_and_unknown_cache_usage() -> None:
    registry = CollectorRegistry()
    engine = FakeEngine("m")
    metrics = Metrics("m", engine, registry)
    Meter(metrics, "completions", Usage(prompt_tokens=10, completion_tokens=1, cached_tokens=8)).end(200)
    assert registry.get_sample_value("aim_cached_prompt_tokens_total", LABELS) == 8
    assert registry.get_sample_value("aim_requests_total", {**LABELS, "operation": "completions", "status": "200"}) == 1
