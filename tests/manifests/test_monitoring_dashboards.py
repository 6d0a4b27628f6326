"""A real Prometheus scrapes the real servers: every panel's query has data, and every rule is evaluated."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from prometheus_client import start_http_server
from typer.testing import CliRunner

from aim_kserve.identity import keys
from aim_profile.cli.app import app
from aim_runtime.cache.add import Options, add
from aim_runtime.cache.index import Cache
from aim_runtime.cache.uri import parse_uri
from aim_trainer.metrics.prometheus import Prometheus as TrainerMetrics
from aim_trainer.metrics.records import Evaluation, Saved, Step
from fake_predictor import FakePredictor
from guarded import ask, orders
from manifest_files import MANIFESTS
from operator_metrics import OperatorMetrics
from ports import free_ports
from real_prometheus import Prometheus, is_installed, target
from scripted_guardrail import CHAT, serving
from served import Served
from sysfs_tree import write_mi300x_cpx, write_sysfs_card

pytestmark = pytest.mark.system

FOLDER = MANIFESTS / "monitoring"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("dashboards/*.json"))}
POLICY = """
use_case: chat
budget_ms: 150
prompt:
  - {type: pii, action: redact}
  - {type: traffic, action: block, options: {requests: {minute: 100000}}}
  - parallel:
      - {type: scripted, id: near, options: {name: near, cacheable: true}, action: flag}
      - {type: scripted, id: far, options: {name: far, cost: remote}, action: flag, on_error: open, on_timeout: open}
answer:
  - {type: scripted, id: late, options: {name: late}, action: flag}
"""
QOS = {
    "version": 1,
    "classes": {"medium": {"slo": {"ttft_ms": 5000, "target": 0.9}}},
    "limits": [{"tenant": "red", "requests_per_minute": 1}],
}
PRICES = {
    "version": 1,
    "currency": "EUR",
    "gpu_hour": {"MI300X": 8},
    "million_tokens": {"m": {"prompt": 1, "generation": 4}},
}


WHO_WAITS = "Waiting by class and tenant"


class Queries(NamedTuple):
    """What a dashboard asks, as Grafana fills it in with everything chosen."""

    board: str
    title: str
    expr: str


def queries() -> list[Queries]:
    filled = {"$namespace": ".*", "$model_name": ".*", "$node": ".*", "$__rate_interval": "1m", "$__range": "1h"}
    found = []
    for name, board in BOARDS.items():
        for panel in board["panels"]:
            for asked in panel.get("targets", []):
                expr = re.sub(r"\$\w+", lambda match: filled[match[0]], asked["expr"])
                found.append(Queries(name, panel["title"], expr))
    return found


class Fleet(NamedTuple):
    prometheus: Prometheus
    feed: Callable[[], None]
    runtime: Served
    caller: Mapping[str, str]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A runtime that asks for keys, a guardrail, a run's metrics, an exporter of a recorded node; who scrapes them."""
    if not is_installed():
        pytest.skip("prometheus is missing: make system-deps")
    folder = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        caller, scraper, eager = written_keys(folder / "keys.yaml")
        runtime = stack.enter_context(started_runtime(folder))
        predictor = stack.enter_context(FakePredictor())
        guarded = stack.enter_context(serving(POLICY, folder, predictor.host))
        run = TrainerMetrics(0, {"name": "helper", "method": "lora", "base_model": "tiny"}, "127.0.0.1")
        stack.callback(run.close)
        exporter = stack.enter_context(started_exporter(folder))
        pod = {"namespace": "llm", "pod": "p-0", "node": "node-1"}
        operator, (operator_port,) = OperatorMetrics(), free_ports(1)
        served, answering = start_http_server(operator_port, "127.0.0.1", operator.registry)
        stack.callback(lambda: (served.shutdown(), served.server_close(), answering.join()))
        operator.of("aim_operator_leads").set(1)
        operator.of("aim_partition_switch_seconds", "SPX/NPS1", "CPX/NPS4", "Verifying").observe(3)
        operator.of("aim_operator_guardrail_policy_pods", "llm", "ours", "current").set(2)
        (folder / "key").write_text(scraper)
        prometheus = Prometheus(
            folder,
            [
                target("aim-serving", f"127.0.0.1:{runtime.http_port}", pod, authorization={"credentials_file": "key"}),
                target("aim-guardrail", f"127.0.0.1:{guarded.server.http_port}", {**pod, "pod": "g-0"}),
                target("aim-trainer", f"127.0.0.1:{run.port}", {**pod, "pod": "t-0"}),
                target("aim-exporter", exporter, {"namespace": "monitoring"}, honor_labels=True),
                target("aim-operator", f"127.0.0.1:{operator_port}", {"namespace": "aim-system"}, honor_labels=True),
            ],
        )
        stack.callback(prometheus.close)
        http = stack.enter_context(httpx.Client(timeout=30))
        steps = iter(range(1, 10_000))
        reviews = operator.of("aim_operator_admission_reviews_total", "validate", "allowed")

        def fed() -> None:
            reviews.inc()
            feed(http, (runtime, caller, eager), guarded.server, (run, next(steps)))

        yield Fleet(prometheus, fed, runtime, {"authorization": f"Bearer {caller}"})


def written_keys(file: Path) -> tuple[str, ...]:
    """The texts of a caller's key, of Prometheus' and of one whose tenant has a limit."""
    asked = {"caller": ("blue", "infer"), "scraper": ("ops", "metrics"), "eager": ("red", "infer")}
    made = [keys.new_key(name, tenant=tenant, scopes=[scope]) for name, (tenant, scope) in asked.items()]
    keys.write(file, keys.KeyFile(keys=tuple(entry for _, entry in made)))
    return tuple(text for text, _ in made)


def started_runtime(folder: Path) -> Served:
    source, cache = folder / "weights/model.bin", Cache(folder / "cache")
    source.parent.mkdir()
    source.write_bytes(b"weights")
    added = add(cache, parse_uri(f"file://{source.parent}"), Options())
    device = {"card": "0", "partition": "0", "compute_mode": "CPX", "memory_mode": "NPS4"}
    options = {"process": True, "slots": 1, "devices": [device], "cached": str(cache.content(added.entry.key))}
    policy = folder / "qos.yaml"
    policy.write_text(yaml.safe_dump(QOS))
    return Served.fake("--qos_policy", str(policy), "--api_keys", str(folder / "keys.yaml"), **options)


@contextmanager
def started_exporter(folder: Path) -> Iterator[str]:
    """`aim-profile exporter` on a recorded node of two cards, neither of which is as planned; its address."""
    root, modes = folder / "tree", {"current_compute_partition": "CPX", "current_memory_partition": "NPS4"}
    write_mi300x_cpx(root / "sys/class/kfd/kfd/topology/nodes", cards=2)
    card = {"vendor": "0x1002", "device": "0x74a1", "mem_info_vram_total": "206141652992"}
    for bdf, used in (("0000:05:00.0", "150000000000"), ("0000:16:00.0", "1000000")):
        write_sysfs_card(root / "sys/bus/pci/drivers/amdgpu", bdf, **card, **modes, mem_info_vram_used=used)
    config = folder / "config"
    config.mkdir()
    node = {"name": "node-1", "gpu": "MI300X", "cards": 2, "compute_partition": "SPX", "memory_partition": "NPS1"}
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"version": 1, "nodes": [node]}))
    load = {"name": "chat", "model": "Qwen/Qwen3-32B", "replicas": 2}
    (folder / "workloads.yaml").write_text(yaml.safe_dump({"version": 1, "workloads": [load]}))
    files = [str(folder / "fleet.yaml"), str(folder / "workloads.yaml")]
    made = CliRunner().invoke(app, ["plan", *files, "--out", str(config / "plan.yaml")])
    assert made.exit_code == 0, made.output
    (config / "prices.yaml").write_text(yaml.safe_dump(PRICES))
    told = ["--root", str(root), "--name", "node-1", "--config", str(config), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "aim_profile", "exporter", *told], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            yield process.stderr.readline().strip().removeprefix("http://").removesuffix("/metrics")
        finally:
            process.kill()


def feed(
    http: httpx.Client, runtime: tuple[Served, str, str], guardrail: Served, run: tuple[TrainerMetrics, int]
) -> None:
    """A little of everything that is counted."""
    server, caller, eager = runtime
    for key, more in ((caller, {}), (caller, {"stream": True}), (caller, {"temperature": -1}), (eager, {})):
        body = {"model": "m", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 5, **more}
        http.post(server.url + CHAT, json=body, headers={"authorization": f"Bearer {key}"})
    for text in ("write bob@example.com", "far=fail", "far=sleep:5", "near=sleep:5"):
        http.post(guardrail.url + CHAT, json=ask(text))
    http.post(guardrail.url + CHAT, json=ask("late=bad", stream=True))
    http.post(guardrail.url + CHAT, json=ask("hi"), headers=orders(drop_after=0))
    metrics, step = run
    metrics.tell(Step(step, 10_000, step / 100, 2.0, 1e-4, 0.5, 900, 400, 0.5, 60.0, 2**30))
    metrics.tell(Evaluation(step, {"eval_loss": 2.1}))
    metrics.tell(Saved(step, "file:///c", 10**6, 0.2))


def test_every_panel_has_data(fleet: Fleet) -> None:
    prometheus, waiting = fleet.prometheus, [each for each in queries() if each.title != WHO_WAITS]
    assert len(waiting) > 70
    fleet.feed()
    # What is counted from nothing has a rate only once it has been seen before.
    prometheus.wait(
        lambda: bool(prometheus.query("guardrail_requests_total and on () aim_trainer_step")), lambda: "no scrape"
    )

    def without_data() -> list[Queries]:
        fleet.feed()
        return [each for each in waiting if not prometheus.query(each.expr)]

    def all_have() -> bool:
        waiting[:] = without_data()
        return not waiting

    prometheus.wait(all_have, lambda: waiting)


def test_who_waits_is_told(fleet: Fleet) -> None:
    """One slot: while a stream holds it, the next request waits."""
    (asked,) = [each.expr for each in queries() if each.title == WHO_WAITS]
    prometheus, url = fleet.prometheus, fleet.runtime.url + CHAT
    body = ask("one", stream=True, max_tokens=10**6, fake={"token_s": 0.02})

    def second() -> None:
        with httpx.stream("POST", url, json=ask("two", max_tokens=1), headers=fleet.caller, timeout=60):
            pass

    with ThreadPoolExecutor(1) as pool:
        with httpx.stream("POST", url, json=body, headers=fleet.caller, timeout=60) as first:
            lines = first.iter_lines()  # kept: the stream ends with it
            next(lines)
            waits = pool.submit(second)
            prometheus.wait(lambda: any(each["value"][1] == "1" for each in prometheus.query(asked)), lambda: asked)
        waits.result()


def test_a_partition_that_a_model_holds_costs_an_eighth(fleet: Fleet) -> None:
    def cost() -> list[str]:
        found = fleet.prometheus.query('namespace_model:aim_gpu_cost_per_hour:sum{model_name="m", currency="EUR"}')
        return [each["value"][1] for each in found]

    fleet.prometheus.wait(lambda: cost() == ["1"], cost)


def test_every_token_has_a_tenant(fleet: Fleet) -> None:
    """Of streams, too, and of one whose client left."""
    same = 'sum(aim_tenant_tokens_total{kind="generation"}) == sum(aim_generation_tokens_total) > 0'
    fleet.prometheus.wait(lambda: bool(fleet.prometheus.query(same)), lambda: same)


def test_rules_are_evaluated_and_drift_is_told(fleet: Fleet) -> None:
    def alerts() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = fleet.prometheus.http.get("/api/v1/alerts").json()["data"]["alerts"]
        return found

    fleet.prometheus.wait(lambda: any(each["labels"]["alertname"] == "AimPartitionDrift" for each in alerts()), alerts)
    groups = fleet.prometheus.http.get("/api/v1/rules").json()["data"]["groups"]
    assert [rule for group in groups for rule in group["rules"] if rule["health"] == "err"] == []
    summaries = [each["annotations"]["summary"] for each in alerts()]
    assert "Node node-1 is not as planned in 2 points." in summaries
    assert [text for text in summaries if "no value" in text] == []
