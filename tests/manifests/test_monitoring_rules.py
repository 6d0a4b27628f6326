"""manifests/monitoring: as it is made, taken by the real schemas; each alert fires when it should and only then."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from aim_profile.kubernetes.generated import MARK, Generated
from aim_profile.kubernetes.monitoring.folder import files, groups
from aim_profile.kubernetes.monitoring.rule import Alert, Recording
from aim_profile.kubernetes.serving_runtime import PORTS
from crd_schemas import CRDS, violations
from manifest_files import MANIFESTS, built, name_of

FOLDER = MANIFESTS / "monitoring"
DOCS = Path(__file__).parents[2] / "docs"
PAGE, METRICS = DOCS / "monitoring.md", DOCS / "metrics.md"
ALERTS = {rule.name: rule for group in groups() for rule in group.rules if isinstance(rule, Alert)}


def test_what_is_there_is_what_is_made() -> None:
    assert Generated(files(MARK)).drift(FOLDER) == []


def test_a_dashboard_that_is_no_more_goes_and_somebodys_stays(tmp_path: Path) -> None:
    made = Generated(files(MARK))
    assert len(made.write(tmp_path)) == len(made.files)
    old = tmp_path / "dashboards/old.json"
    old.write_text((tmp_path / "dashboards/aim-fleet.json").read_text())
    assert made.write(tmp_path) == ["dashboards/old.json: nothing makes it"]
    assert not old.exists()
    old.write_text('{"title": "mine"}')
    told = [sys.executable, "-m", "aim_profile.kubernetes", str(tmp_path), "--monitoring"]
    done = subprocess.run(told, capture_output=True, text=True, check=False)
    assert (done.returncode, old.exists()) == (1, True)
    assert "old.json is not generated" in done.stderr


@pytest.mark.parametrize("folder", ["base", "with-token"])
def test_what_is_applied(folder: str) -> None:
    objects = {(each["kind"], name_of(each)): each for each in built(FOLDER / folder)}
    assert sorted(objects) == [
        ("ConfigMap", "aim-dashboards"),
        ("DaemonSet", "aim-exporter"),
        ("PodMonitor", "aim-exporter"),
        ("PodMonitor", "aim-serving"),
        ("PodMonitor", "aim-trainer"),
        ("PrometheusRule", "aim"),
        ("ServiceMonitor", "aim-operator"),
    ]
    if CRDS:  # the real schemas, where they are at hand
        assert {name: found for name, each in objects.items() if (found := violations(each))} == {}
    boards = objects["ConfigMap", "aim-dashboards"]["data"]
    assert {json.loads(text)["uid"] + ".json" for text in boards.values()} == set(boards)
    assert len(boards) == 4
    rules = yaml.safe_load((FOLDER / "aim.rules").read_text())
    assert objects["PrometheusRule", "aim"]["spec"] == rules
    endpoint = objects["PodMonitor", "aim-serving"]["spec"]["podMetricsEndpoints"][0]
    assert ("authorization" in endpoint) is (folder == "with-token")
    others = [objects["PodMonitor", name]["spec"]["podMetricsEndpoints"][0] for name in ("aim-trainer", "aim-exporter")]
    assert all("authorization" not in each for each in others)


def test_monitors_find_the_pods_that_are_made() -> None:
    """A key of ours goes to pods of ours only."""
    monitors = {name_of(each): each["spec"] for each in built(FOLDER / "base") if each["kind"] == "PodMonitor"}
    (selector,) = monitors["aim-serving"]["selector"]["matchExpressions"]
    guarded = next(each for each in built(MANIFESTS / "samples/guarded-model") if each["kind"] == "InferenceService")
    runtimes = [each for each in built(MANIFESTS / "overlays/dev-cpu") if each["kind"] == "ClusterServingRuntime"]
    labels = [each["spec"]["labels"] for each in runtimes] + [guarded["spec"]["transformer"]["labels"]]
    assert {each[selector["key"]] for each in labels} == set(selector["values"])
    services = [each for each in built(MANIFESTS / "operator") if each["kind"] == "Service"]
    operator = next(each["spec"] for each in built(FOLDER / "base") if each["kind"] == "ServiceMonitor")
    (service,) = [
        each for each in services if operator["selector"]["matchLabels"].items() <= each["metadata"]["labels"].items()
    ]
    assert operator["endpoints"][0]["port"] in {each["name"] for each in service["spec"]["ports"]}
    ports = {each["name"] for each in PORTS}
    assert monitors["aim-serving"]["podMetricsEndpoints"][0]["port"] in ports
    daemon = next(each for each in built(FOLDER / "base") if each["kind"] == "DaemonSet")
    (named,) = daemon["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert monitors["aim-exporter"]["podMetricsEndpoints"][0]["port"] == named["name"]


# --- alerts ---------------------------------------------------------------------------------------------------------

POD = {"namespace": "llm", "pod": "p-0", "instance": "10.0.0.1:8080", "job": "monitoring/aim-serving"}
MODEL = {**POD, "model_name": "chat", "engine": "vllm"}
CLASS = {**POD, "model_name": "chat", "class": "high"}
NODE = {"node": "n0", "job": "monitoring/aim-exporter", "instance": "10.0.0.2:9402"}
OPERATOR = {"namespace": "llm", "job": "aim-operator"}
Series = dict[str, str]


def series(name: str, labels: Mapping[str, str], **more: str) -> str:
    pairs = ", ".join(f'{key}="{value}"' for key, value in {**labels, **more}.items())
    return f"{name}{{{pairs}}}"


#: A minute apart, for two hours: a busy, healthy fleet.
HEALTHY: Series = {
    series("up", POD): "1x120",
    series("up", NODE): "1x120",
    series("aim_model_state", POD, model_name="chat", state="ready"): "1x120",
    series("aim_engine_state", MODEL, state="ready"): "1x120",
    series("aim_engine_restarts_total", MODEL): "2x120",
    series("aim_engine_stalled_seconds", MODEL): "0x120",
    series("aim_requests_total", MODEL, operation="chat/completions", status="200"): "0+600x120",
    series("aim_requests_total", MODEL, operation="chat/completions", status="503"): "0+6x120",
    series("aim_requests_waiting", MODEL): "3x120",
    series("aim_engine_slots", MODEL): "32x120",
    series("aim_qos_rejections_total", CLASS, reason="rate"): "0+5x120",
    series("aim_qos_rejections_total", CLASS, reason="queue_full"): "7x120",
    series("aim_slo_burn_rate", CLASS, window="5m"): "0.5x120",
    series("aim_slo_burn_rate", CLASS, window="1h"): "0.5x120",
    series("aim_slo_burn_rate", CLASS, window="3d"): "0.5x120",
    series("aim_memory_used_bytes", POD, scope="card", card="0"): "95x120",
    series("aim_memory_total_bytes", POD, scope="card", card="0"): "100x120",
    series("aim_memory_used_bytes", POD, scope="cgroup"): "60x120",
    series("aim_memory_total_bytes", POD, scope="cgroup"): "100x120",
    series("aim_memory_admission_stopped", POD, scope="cgroup"): "0x120",
    series("aim_kv_cache_usage_ratio", MODEL): "0.8x120",
    series("aim_cache_free_bytes", POD): "400x120",
    series("aim_cache_size_bytes", POD): "600x120",
    series("aim_identity_source_ok", POD, source="jwks"): "1x120",
    series("guardrail_requests_total", POD, direction="prompt", use_case="chat", decision="allow"): "0+600x120",
    series("guardrail_requests_total", POD, direction="prompt", use_case="chat", decision="error"): "0+1x120",
    series("guardrail_errors_total", POD, detector="d", reason="closed"): "0+1x120",
    series("guardrail_timeouts_total", POD, detector="d", outcome="closed"): "0+1x120",
    series("guardrail_budget_exceeded_total", POD, use_case="chat"): "0+6x120",
    series("guardrail_overhead_seconds_bucket", POD, direction="prompt", use_case="chat", le="0.1"): "0+600x120",
    series("guardrail_overhead_seconds_bucket", POD, direction="prompt", use_case="chat", le="1"): "0+600x120",
    series("guardrail_overhead_seconds_bucket", POD, direction="prompt", use_case="chat", le="+Inf"): "0+600x120",
    series("guardrail_policy_reload_total", POD, result="ok"): "0+1x120",
    series("guardrail_audit_dropped_total", POD): "0x120",
    series("aim_trainer_step", POD): "0+4x120",
    series("aim_trainer_planned_steps", POD): "5000x120",
    series("aim_trainer_checkpoint_age_seconds", POD): "600x120",
    series("aim_plan_differences", NODE): "0x120",
    series("aim_node_source_ok", NODE, source="plan"): "1x120",
    series("aim_operator_leads", OPERATOR, pod="o-0"): "1x120",
    series("aim_operator_leads", OPERATOR, pod="o-1"): "0x120",
    series("aim_operator_admission_reviews_total", OPERATOR, webhook="validate", outcome="denied"): "0+1x120",
    series("aim_operator_guardrail_policy_pods", OPERATOR, policy="p", state="current"): "3x120",
}


class Case(NamedTuple):
    """sick: what is other than in HEALTHY, from the second hour on; labels: of the alert, without severity."""

    sick: Series
    labels: Mapping[str, str]


_JOB = {"job": "aim-operator"}
_CHAT = {"namespace": "llm", "model_name": "chat"}
_SLOW = {"0.1": "0+600x59 35500+100x60", "1": "0+600x120", "+Inf": "0+600x120"}

CASES: dict[str, Case] = {
    "AimTargetDown": Case({series("up", POD): "1x59 0x60"}, POD),
    "AimModelFailed": Case(
        {series("aim_model_state", POD, model_name="chat", state="failed"): "_x59 1x60"},
        {**POD, "model_name": "chat", "state": "failed"},
    ),
    "AimEngineDead": Case(
        {series("aim_engine_state", MODEL, state="failed"): "_x59 1x60"}, {**MODEL, "state": "failed"}
    ),
    "AimEngineRestarts": Case({series("aim_engine_restarts_total", MODEL): "2x59 3+1x60"}, MODEL),
    "AimEngineStalled": Case({series("aim_engine_stalled_seconds", MODEL): "0x59 60+60x60"}, MODEL),
    "AimRequestsFail": Case(
        {series("aim_requests_total", MODEL, operation="chat/completions", status="503"): "0x59 0+60x60"}, _CHAT
    ),
    "AimQueueLong": Case({series("aim_requests_waiting", MODEL): "3x59 40x60"}, _CHAT),
    "AimRequestsRefused": Case(
        {series("aim_qos_rejections_total", CLASS, reason="queue_full"): "7x59 8+1x60"},
        {**_CHAT, "class": "high", "reason": "queue_full"},
    ),
    "AimSloBurnFast": Case(
        {series("aim_slo_burn_rate", CLASS, window=window): "0.5x59 20x60" for window in ("5m", "1h")},
        {**CLASS, "window": "1h"},
    ),
    "AimSloBurnSlow": Case(
        {series("aim_slo_burn_rate", CLASS, window=window): "0.5x39 2x80" for window in ("1h", "3d")},
        {**CLASS, "window": "3d"},
    ),
    "AimMemoryNearlyFull": Case(
        {series("aim_memory_used_bytes", POD, scope="cgroup"): "60x59 93x60"}, {**POD, "scope": "cgroup"}
    ),
    "AimMemoryFull": Case(
        {series("aim_memory_admission_stopped", POD, scope="cgroup"): "0x59 1x60"}, {**POD, "scope": "cgroup"}
    ),
    "AimKvCacheFull": Case({series("aim_kv_cache_usage_ratio", MODEL): "0.8x59 0.99x60"}, MODEL),
    "AimModelCacheFull": Case({series("aim_cache_free_bytes", POD): "400x59 50x60"}, POD),
    "AimCredentialsUnreadable": Case(
        {series("aim_identity_source_ok", POD, source="jwks"): "1x59 0x60"}, {**POD, "source": "jwks"}
    ),
    "AimGuardrailErrors": Case(
        {
            series(
                "guardrail_requests_total", POD, direction="prompt", use_case="chat", decision="timeout"
            ): "_x59 0+20x60"
        },
        {"namespace": "llm"},
    ),
    "AimGuardrailUnchecked": Case(
        {series("guardrail_timeouts_total", POD, detector="d", outcome="open"): "_x59 0+1x60"},
        {"namespace": "llm", "detector": "d"},
    ),
    "AimGuardrailSlow": Case(
        {
            series("guardrail_overhead_seconds_bucket", POD, direction="prompt", use_case="chat", le=le): values
            for le, values in _SLOW.items()
        },
        {"namespace": "llm", "direction": "prompt", "use_case": "chat"},
    ),
    "AimGuardrailOverBudget": Case(
        {series("guardrail_budget_exceeded_total", POD, use_case="chat"): "0x59 0+60x60"}, {"namespace": "llm"}
    ),
    # The first refusal makes the series.
    "AimGuardrailPolicyRefused": Case(
        {series("guardrail_policy_reload_total", POD, result="invalid"): "_x110 1x9"}, {**POD, "result": "invalid"}
    ),
    "AimGuardrailAuditLost": Case({series("guardrail_audit_dropped_total", POD): "0x110 3x9"}, POD),
    "AimTrainingStalled": Case({series("aim_trainer_step", POD): "0+4x59 240x60"}, POD),
    "AimTrainingCheckpointOld": Case({series("aim_trainer_checkpoint_age_seconds", POD): "600x59 14400+60x60"}, POD),
    "AimPartitionDrift": Case({series("aim_plan_differences", NODE): "0x59 2x60"}, NODE),
    "AimNodeUnreadable": Case(
        {series("aim_node_source_ok", NODE, source="plan"): "1x59 0x60"}, {**NODE, "source": "plan"}
    ),
    "AimOperatorLeaderless": Case({series("aim_operator_leads", OPERATOR, pod="o-0"): "1x59 0x60"}, _JOB),
    "AimAdmissionFails": Case(
        {series("aim_operator_admission_reviews_total", OPERATOR, webhook="validate", outcome="failed"): "_x59 0+1x60"},
        {**_JOB, "webhook": "validate"},
    ),
    "AimPolicyStale": Case(
        {series("aim_operator_guardrail_policy_pods", OPERATOR, policy="p", state="stale"): "0x59 2x60"},
        {**OPERATOR, "policy": "p", "state": "stale"},
    ),
}


def promtool(*arguments: str | Path) -> str:
    """What it says; a skip where it is missing, a failure where it finds something."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is missing: make system-deps")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def of_case(name: str, text: str) -> str:
    """The same labels in a namespace and on a node of the case's own."""
    for key, value in (("namespace", "llm"), ("node", "n0"), ("job", "aim-operator")):
        text = text.replace(f'{key}="{value}"', f'{key}="{name}"')
    return text


def unit_tests(folder: Path, tests: Sequence[Any], rules: Path = FOLDER / "aim.rules") -> Path:
    file = folder / "tests.yaml"
    file.write_text(json.dumps({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}))
    return file


@pytest.mark.system
def test_each_alert_fires_alone_and_a_healthy_fleet_is_silent(tmp_path: Path) -> None:
    """Side by side: a namespace and a node for each case, and one where nothing is wrong."""
    assert set(CASES) == set(ALERTS)
    values = {of_case("healthy", each): text for each, text in HEALTHY.items()}
    firing = []
    for name, case in CASES.items():
        values |= {of_case(name, each): text for each, text in (HEALTHY | case.sick).items()}
        told = {"alertname": name, "alertstate": "firing", "severity": ALERTS[name].severity, **case.labels}
        firing.append({"labels": of_case(name, series("ALERTS", told)), "value": 1})
    expr = 'ALERTS{alertstate="firing"}'
    test = {
        "interval": "1m",
        "input_series": [{"series": each, "values": text} for each, text in values.items()],
        "promql_expr_test": [
            {"expr": expr, "eval_time": "59m", "exp_samples": []},
            {"expr": expr, "eval_time": "119m", "exp_samples": firing},
        ],
    }
    promtool("test", "rules", unit_tests(tmp_path, [test]))


def test_the_page_has_each_alert_with_its_meaning_and_remedy() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `Aim")]
    shown = {name: re.sub(r"\{\{ \$(?:labels\.)?(\w+) \}\}", r"*\1*", each.summary) for name, each in ALERTS.items()}
    assert rows == [
        [f"`{name}`", f"{each.severity}, {each.lasting}", shown[name], each.remedy] for name, each in ALERTS.items()
    ]


def test_rules_and_dashboards_ask_for_what_the_servers_have() -> None:
    """Families are those of the metrics page, which tests hold against the servers; series of ours are recorded."""
    known = set(re.findall(r"`((?:aim|guardrail)_\w+)`", METRICS.read_text()))
    histograms = {f"{name}_{part}" for name in known for part in ("bucket", "sum", "count")}
    asked = {rule.expr for group in groups() for rule in group.rules}
    asked |= {
        target["expr"]
        for board in FOLDER.glob("dashboards/*.json")
        for panel in json.loads(board.read_text())["panels"]
        for target in panel.get("targets", [])
    }
    recorded = {rule.record for group in groups() for rule in group.rules if isinstance(rule, Recording)}
    used = {name for expr in asked for name in re.findall(r"[\w:]*\b(?:aim|guardrail)_[\w:]+", expr)}
    assert {name for name in used if ":" in name} <= recorded
    assert {name for name in used if ":" not in name} <= known | histograms


def test_what_an_alert_says_is_in_its_labels() -> None:
    for name, alert in ALERTS.items():
        used = set(re.findall(r"\$labels\.(\w+)", alert.summary + alert.remedy))
        assert used <= {*CASES[name].labels, "replica"}, name


@pytest.mark.system
def test_rules_and_the_pages_query_are_promql(tmp_path: Path) -> None:
    rules = sum(len(group.rules) for group in groups())
    assert f"{rules} rules found" in promtool("check", "rules", FOLDER / "aim.rules")
    found = re.findall(r"```promql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    asked = [{"record": f"page:query{at}", "expr": expr} for at, expr in enumerate(found)]
    (tmp_path / "page.json").write_text(json.dumps({"groups": [{"name": "page", "rules": asked}]}))
    assert "1 rules found" in promtool("check", "rules", tmp_path / "page.json")


CARD = {"node": "n0", "card": "0"}
DEVICE = {"namespace": "llm", "pod": "p-0", "instance": "i", "node": "n0", "compute_mode": "CPX", "memory_mode": "NPS4"}


@pytest.mark.system
def test_a_partition_costs_its_share_of_the_compute_units(tmp_path: Path) -> None:
    """Two models share a partition of eight, a third has one in another pod; the exporter was started again."""
    values = {
        **{series("aim_partition_compute_units", CARD, partition=str(at), instance="e"): "38x90" for at in range(8)},
        **{series("aim_partition_compute_units", CARD, partition=str(at), instance="new"): "38x90" for at in range(8)},
        **{
            series("aim_card_info", {**CARD, "compute_mode": "CPX", "memory_mode": "NPS4"}, instance=each): "1x90"
            for each in ("e", "new")
        },
        series("aim_price_per_gpu_hour", CARD, product="MI300X", currency="EUR", instance="e"): "8x90",
        series("aim_price_per_million_tokens", {}, model_name="one", kind="prompt", currency="EUR"): "0.5x90",
        series("aim_price_per_million_tokens", {}, model_name="one", kind="generation", currency="EUR"): "2x90",
        series("aim_model_device_info", DEVICE, model_name="one", card="0", partition="0"): "1x90",
        series("aim_model_device_info", DEVICE, model_name="two", card="0", partition="0"): "1x90",
        # In a pod of its own the device's place is the pod's, not the node's.
        series("aim_model_device_info", {**DEVICE, "pod": "p-1"}, model_name="two", card="0", partition="0"): "1x90",
        series("aim_prompt_tokens_total", DEVICE, model_name="one"): "0+60000x90",
        series("aim_generation_tokens_total", DEVICE, model_name="one"): "0+6000x90",
    }
    # Of model one blue takes three quarters, red the rest.
    for tenant, kind, count in (("blue", "prompt", 45000), ("blue", "generation", 4500), ("red", "prompt", 16500)):
        labels = {"model_name": "one", "tenant": tenant, "kind": kind}
        values[series("aim_tenant_tokens_total", DEVICE, **labels)] = f"0+{count}x90"
    one, two = ({"namespace": "llm", "model_name": name} for name in ("one", "two"))
    blue, red = ({**one, "tenant": tenant} for tenant in ("blue", "red"))
    euro = {**one, "currency": "EUR"}
    of_two = {"currency": "EUR", **two}
    expected = {
        "namespace_model:aim_gpus:sum": [(one, 1 / 16), (two, 3 / 16)],
        # A minute's sample for each minute of the hour, both ends of it.
        "namespace_model:aim_gpu_seconds:sum1h": [(one, 61 * 60 / 16), (two, 61 * 60 * 3 / 16)],
        "namespace_model:aim_gpu_cost_per_hour:sum": [(euro, 0.5), (of_two, 1.5)],
        "namespace_model:aim_token_price_per_hour:sum": [(euro, 3.6 * 0.5 + 0.36 * 2)],
        "namespace_model:aim_cost_per_million_tokens:ratio": [(euro, 0.5 / 3.96)],
        "namespace_tenant_model:aim_gpus:sum": [(blue, 3 / 64), (red, 1 / 64)],
        "namespace_tenant_model:aim_gpu_seconds:sum1h": [(blue, 61 * 60 * 3 / 64), (red, 61 * 60 / 64)],
        "namespace_tenant_model:aim_gpu_cost_per_hour:sum": [(blue | euro, 0.375), (red | euro, 0.125)],
        "namespace_tenant_model:aim_token_price_per_hour:sum": [
            (blue | euro, 2.7 * 0.5 + 0.27 * 2),
            (red | euro, 0.99 * 0.5),
        ],
    }
    tests = [
        {
            "expr": f"round({of}, 0.0001)",
            "eval_time": "80m",
            "exp_samples": [{"labels": series("", who), "value": round(value, 4)} for who, value in rows],
        }
        for of, rows in expected.items()
    ]
    inputs = [{"series": each, "values": text} for each, text in values.items()]
    case = {"interval": "1m", "input_series": inputs, "promql_expr_test": tests}
    promtool("test", "rules", unit_tests(tmp_path, [case]))
