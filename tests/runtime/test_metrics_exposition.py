"""What Prometheus reads: names, labels and values; checked by promtool where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import aim_kserve.identity.verify  # noqa: F401  registers its families
from aim_kserve.identity.caller import Caller, set_caller
from aim_runtime.admission.metrics import families as service_levels
from aim_runtime.audit import Audit
from aim_runtime.cache.gauges import CacheGauges
from aim_runtime.engine_gauges import Device
from aim_runtime.engines.base import EngineStats, State, Usage
from aim_runtime.memory_watch import MemoryWatch
from aim_runtime.metrics import NO_TOKEN, TENANTS_NAMED, Meter, Metrics, families
from fake_engine import FakeEngine
from served import Served

ASK = [{"role": "user", "content": "one two"}]
MODEL = {"model_name": "m", "engine": "fake", "variant": ""}
LABELS = {**MODEL, "adapter": ""}
ENGINE = {**MODEL, "replica": ""}


def scrape(server: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = httpx.get(f"{server.url}/metrics").text
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value for item in families for sample in item.samples
    }


def value(samples: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return samples.get((name, frozenset({**LABELS, **labels}.items())), 0.0)


def gauge(samples: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str) -> float:
    return samples[name, frozenset(ENGINE.items())]


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
    assert gauge(samples, "aim_requests_running") == 1
    assert gauge(samples, "aim_requests_waiting") == 0
    assert gauge(samples, "aim_engine_slots") == 8
    assert gauge(samples, "aim_kv_cache_usage_ratio") == 0.25


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
        "aim_tenant_tokens_total": "counter",
        "aim_requests_running": "gauge",
        "aim_requests_waiting": "gauge",
        "aim_engine_slots": "gauge",
        "aim_kv_cache_usage_ratio": "gauge",
        "aim_model_state": "gauge",
        "aim_audit_lost_lines_total": "counter",
        "aim_memory_used_bytes": "gauge",
        "aim_memory_total_bytes": "gauge",
        "aim_memory_limit_bytes": "gauge",
        "aim_memory_admission_stopped": "gauge",
    }


@pytest.mark.system
def test_promtool_finds_nothing_to_say(fake: Served) -> None:
    said = promtool_says(exposition(fake))
    if said is None:
        pytest.skip("promtool is missing: make system-deps")
    assert said == (0, "", "")


def promtool_says(text: str) -> tuple[int, str, str] | None:
    """Exit code, stdout and stderr of its linter; None where there is no promtool."""
    promtool = shutil.which("promtool")
    if promtool is None:
        return None
    check = subprocess.run([promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False)
    return check.returncode, check.stdout, check.stderr


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


def test_tokens_are_counted_by_who_pays_and_tenants_are_bounded() -> None:
    registry = CollectorRegistry()
    metrics = Metrics("m", FakeEngine("m"), registry)
    Meter(metrics, "completions", Usage(prompt_tokens=1)).end(200)
    assert "aim_tenant_tokens_total" not in samples_of(registry)
    try:
        for tenant in ("blue", *(f"t{number}" for number in range(TENANTS_NAMED + 5)), "blue"):
            set_caller(Caller("key", tenant, frozenset({"infer"})))
            Meter(metrics, "completions", Usage(prompt_tokens=3, completion_tokens=2)).end(200)
    finally:
        set_caller(None)
    counted = {
        (labels["tenant"], labels["kind"]): value for labels, value in samples_of(registry)["aim_tenant_tokens_total"]
    }
    assert len({tenant for tenant, _ in counted}) == TENANTS_NAMED + 1
    assert (counted["blue", "prompt"], counted["blue", "generation"]) == (6, 4)
    assert counted["other", "prompt"] == 3 * 6
    metrics.remove()
    assert samples_of(registry) == {}


def samples_of(registry: CollectorRegistry) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Sample name → its labels and values, as Prometheus reads them; no sample stands twice."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            rows = found.setdefault(sample.name, [])
            assert sample.labels not in [labels for labels, _ in rows], sample
            rows.append((sample.labels, sample.value))
    return found


@dataclass
class Supervised(FakeEngine):
    """What an engine in a child process says besides."""

    restarts: int = 2
    state: State = "ready"
    load_seconds: float | None = 1.5

    def stats(self) -> EngineStats:
        return replace(super().stats(), state=self.state, restarts=self.restarts)


def test_several_models_share_the_families_and_leave_nothing_behind() -> None:
    registry = CollectorRegistry()
    empty = samples_of(registry) | samples_of_families(registry)
    one, two = (Metrics(name, FakeEngine(name), registry, variant=name) for name in ("one", "two"))
    for metrics in (one, two, one.for_adapter("french")):
        meter = Meter(metrics, "completions", Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1))
        meter.tick(b'{"choices":[{"text":"a"}]}')
        meter.tick(b'{"choices":[{"text":"b"}]}')
        meter.end(200)
        metrics.ignored("completions", 1)
    counted = {
        (labels["model_name"], labels["variant"], labels["adapter"]): value
        for labels, value in samples_of(registry)["aim_requests_total"]
    }
    assert counted == {("one", "one", ""): 1, ("one", "one", "french"): 1, ("two", "two", ""): 1}
    for name in ("aim_time_to_first_token_seconds_count", "aim_inter_token_latency_seconds_count"):
        assert len([value for _, value in samples_of(registry)[name] if value == 1]) == 3

    one.remove_adapter("french")
    assert not any(labels.get("adapter") for rows in samples_of(registry).values() for labels, _ in rows)
    one.remove()
    one.remove()
    assert {labels["model_name"] for rows in samples_of(registry).values() for labels, _ in rows} == {"two"}
    two.remove()
    assert samples_of(registry) == empty == {}


def samples_of_families(registry: CollectorRegistry) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The same once the families are there."""
    assert families(registry) is families(registry)
    return samples_of(registry)


def test_a_request_that_outlives_its_model_does_not_bring_it_back() -> None:
    registry = CollectorRegistry()
    metrics = Metrics("m", FakeEngine("m"), registry)
    late, adapted = Meter(metrics, "completions", Usage()), Meter(metrics.for_adapter("a"), "completions", Usage(1, 1))
    metrics.remove()
    for meter in (late, adapted):
        meter.tick(b'{"choices":[{"text":"a"}]}')
        meter.end(200)
    metrics.ignored("completions", 2)
    assert samples_of(registry) == {}


def test_a_model_that_migrates_keeps_its_counts_and_shows_no_sample_twice() -> None:
    registry = CollectorRegistry()
    old = Metrics("m", Supervised("m", slots=2), registry, devices=[Device("0", "3", "CPX", "NPS4")])
    Meter(old, "completions", Usage()).end(200)
    new = Metrics("m", Supervised("m", slots=3, load_seconds=2.5), registry, devices=[Device("1", "", "SPX", "NPS1")])
    both = samples_of(registry)
    assert both["aim_engine_slots"] == [({**ENGINE}, 5)]
    assert both["aim_model_load_seconds"] == [({**ENGINE}, 2.5)]
    assert both["aim_engine_restarts_total"] == [({**ENGINE}, 4)]
    assert sorted(labels["card"] for labels, _ in both["aim_model_device_info"]) == ["0", "1"]
    old.remove()
    Meter(new, "completions", Usage()).end(200)
    after = samples_of(registry)
    assert after["aim_requests_total"] == [({**LABELS, "operation": "completions", "status": "200"}, 2)]
    assert after["aim_engine_slots"] == [({**ENGINE}, 3)]
    modes = {"card": "1", "partition": "", "compute_mode": "SPX", "memory_mode": "NPS1"}
    assert after["aim_model_device_info"] == [({**ENGINE, **modes}, 1)]


def test_engines_behind_one_name_are_told_apart_by_replica() -> None:
    registry = CollectorRegistry()
    metrics = Metrics("m", FakeEngine("m"), registry, gauges=False)
    first = metrics.watch(Supervised("m", slots=2, state="restarting", restarts=0), replica="0")
    metrics.watch(Supervised("m", slots=3), replica="1")
    families(registry).engines.show_models(lambda: {"m": "ready", "n": "loading"})
    samples = samples_of(registry)
    assert {labels["replica"]: value for labels, value in samples["aim_engine_slots"]} == {"0": 2, "1": 3}
    assert {labels["replica"]: value for labels, value in samples["aim_engine_restarts_total"]} == {"0": 0, "1": 2}
    states = {labels["replica"]: labels["state"] for labels, value in samples["aim_engine_state"] if value}
    assert states == {"0": "restarting", "1": "ready"}
    assert samples["aim_model_state"] == [
        ({"model_name": "m", "state": "ready"}, 1),
        ({"model_name": "n", "state": "loading"}, 1),
    ]
    assert promtool_says(generate_latest(registry).decode()) in ((0, "", ""), None)
    metrics.unwatch(first)
    assert [labels["replica"] for labels, _ in samples_of(registry)["aim_engine_slots"]] == ["1"]


DOCS = Path(__file__).parents[2] / "docs/metrics.md"


def test_the_page_names_every_family_and_no_other() -> None:
    registry = CollectorRegistry()
    families(registry)
    service_levels(registry)
    MemoryWatch(registry)
    Audit(lambda _: None, registry)
    CacheGauges(registry)
    shell = [name for name in REGISTRY._names_to_collectors if name.startswith("aim_identity_")]
    ours = {name for name in (*registry._names_to_collectors, *shell) if name.startswith("aim_")}
    spans = {"aim_trace_spans_lost_total"}  # test_tracing.py sees it
    known = {name for name in ours if not name.endswith(("_created", "_bucket", "_sum", "_count"))} | spans
    # The trainer's: test_sinks.py; the exporter's: test_exporter.py; the operator's: test_operator_metrics.py.
    named = set(re.findall(r"`(aim_(?!trainer_|node_|card_|partition_|plan_|price_|operator_)\w+)`", DOCS.read_text()))
    assert {name.removesuffix("_total") for name in named} == {name.removesuffix("_total") for name in known}
    assert named <= known


@pytest.mark.system
def test_the_pages_queries_are_promql(tmp_path: Path) -> None:
    queries = re.findall(r"```promql\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(queries) == 6
    rules = [{"record": f"documented:query{index}", "expr": query} for index, query in enumerate(queries)]
    file = tmp_path / "rules.json"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "page", "rules": rules}]}))
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: make system-deps")
    check = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.mark.model
def test_an_engine_in_a_process_of_its_own_tells_how_it_is(real: Served) -> None:
    labels = {"model_name": "smollm2", "engine": "llama_cpp", "variant": "", "replica": ""}
    samples = scrape(real)
    assert samples["aim_engine_restarts_total", frozenset(labels.items())] == 0
    assert samples["aim_model_load_seconds", frozenset(labels.items())] > 0
    assert samples["aim_engine_state", frozenset({**labels, "state": "ready"}.items())] == 1
    assert samples["aim_model_state", frozenset({"model_name": "smollm2", "state": "ready"}.items())] == 1
    assert samples["aim_memory_used_bytes", frozenset({"scope": "machine", "card": "", "partition": ""}.items())] > 0
    assert promtool_says(exposition(real)) in ((0, "", ""), None)
