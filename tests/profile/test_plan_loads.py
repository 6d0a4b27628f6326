"""Replicas derived from loads: by the cautious end, from evidence that is named, never silently from a bound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.plans.fleet import Fleet, load_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Plan, PlanOptions, dump_plan, parse_plan
from aim_profile.plans.workload import WorkloadError, Workloads, parse_workloads
from aim_profile.serving.evidence import Measurement

CHAT = """\
workloads:
- name: chat
  model: meta-llama/Llama-3.1-8B-Instruct
  precision: fp8
  load: {requests_per_s: 40, prompt_tokens: 512, answer_tokens: 256}
  slo: {ttft_ms: 500, itl_ms: 50}
"""


def fleet(tmp_path: Path, gpu: str, cards: int = 8) -> Fleet:
    file = tmp_path / f"{gpu}.yaml"
    file.write_text(f"nodes:\n- {{name: node-a, gpu: {gpu}, cards: {cards}}}\n", encoding="utf-8")
    return load_fleet(file)


def asked(**changed: Any) -> Workloads:
    body = yaml.safe_load(CHAT)
    body["workloads"][0] |= changed
    return parse_workloads(yaml.safe_dump(body))


def measured(gpu: str = "MI355X", partition: str = "SPX/NPS1") -> Measurement:
    """Of 512 + 256 tokens: clients and milliseconds between tokens."""

    def point(clients: int, itl: float) -> dict[str, Any]:
        tokens_per_s = clients / itl * 1000
        return {
            "offered": clients,
            "duration_s": 400 * 256 / tokens_per_s,
            "answered": 400,
            "requests_per_s": tokens_per_s / 256,
            "output_tokens_per_s": tokens_per_s,
            "prompt_tokens": 400 * 512,
            "output_tokens": 400 * 256,
            "ttft_ms": {"p50": 50, "p95": 60, "p99": 70},
            "itl_ms": {"p50": itl, "p95": itl * 1.1, "p99": itl * 1.2},
        }

    load = {"generator": "aim-runtime measure", "arrivals": "closed", "seed": 1, "warm_up": 2, "requests": 1600}
    return Measurement.model_validate(
        {
            "version": 1,
            "model": "meta-llama/Llama-3.1-8B-Instruct",
            "served_as": "chat",
            "precision": "fp8",
            "hardware": {"told_by": "node", "gpu": gpu, "partition": partition, "gpu_count": 1},
            "engine": {"name": "vllm"},
            "load": {**load, "prompt_tokens": "512", "output_tokens": "256", "prompts": "x", "duration_s": 60},
            "points": [point(8, 6), point(64, 14), point(128, 24), point(256, 44)],
            "command": "aim-runtime measure",
            "date": "2026-01-02T03:04:05+00:00",
            "tool": "aim-kserve 0.1.0",
        }
    )


def planned(tmp_path: Path, gpu: str, measurements: Sequence[Measurement] = (), **options: Any) -> Plan:
    return make_plan(fleet(tmp_path, gpu), asked(), PlanOptions(**options), measurements=measurements)


def test_replicas_follow_from_a_load_by_the_cautious_end_and_the_plan_says_from_what(tmp_path: Path) -> None:
    plan = planned(tmp_path, "MI355X")
    (how,) = plan.derived
    assert how.basis == "estimate"
    assert how.replicas == len(plan.placements) == 3
    assert (how.replicas - 1) * how.requests_per_s_each < 40 <= how.replicas * how.requests_per_s_each
    assert "cautious end" in how.reason
    assert "published by AMD" in how.evidence[0]
    assert {(run.concurrency, run.context, run.slo) for run in plan.placements} == {(how.concurrency, 768, "latency")}
    assert parse_plan(dump_plan(plan)) == plan


def test_evidence_of_the_device_itself_gives_other_replicas_and_says_why(tmp_path: Path) -> None:
    plan = planned(tmp_path, "MI355X", [measured()])
    (how,) = plan.derived
    assert how.basis == "measured"
    assert how.replicas == len(plan.placements) == 2
    assert how.concurrency == 256
    assert "measured on 2026-01-02" in how.evidence[0]
    assert "without that evidence 3 replicas" in how.reason
    assert {run.mode for run in plan.placements} == {"SPX/NPS1"}


def test_a_bound_is_no_evidence_unless_it_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="not derived from a bound: there is no evidence of gfx942") as refused:
        planned(tmp_path, "MI300X")
    assert refused.value.field == "chat.load"
    assert "--accept-bound" in refused.value.remedy
    (how,) = planned(tmp_path, "MI300X", accept_bound=True).derived
    assert how.basis == "bound"
    assert "bound, not an estimate" in how.reason


def test_evidence_of_one_mode_of_a_class_is_evidence_for_its_others(tmp_path: Path) -> None:
    (how,) = planned(tmp_path, "MI300X", [measured("MI300X", "SPX/NPS1")]).derived
    assert how.basis == "measured"
    assert "without that evidence there is only a bound" in how.reason


def test_a_promise_that_nothing_keeps_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no device of the fleet keeps it") as refused:
        make_plan(fleet(tmp_path, "MI355X"), asked(slo={"itl_ms": 1}))
    assert refused.value.field == "chat.slo"


def test_what_fits_nowhere_is_told_by_the_planner(tmp_path: Path) -> None:
    plan = make_plan(fleet(tmp_path, "MI355X", 1), asked(model="deepseek-ai/DeepSeek-R1"))
    assert plan.unplaced[0].cause == "too-large"
    assert plan.derived == ()


def test_devices_that_are_named_are_the_only_ones(tmp_path: Path) -> None:
    plan = make_plan(fleet(tmp_path, "MI355X"), asked(devices=["MI355X DPX/NPS2"]))
    (how,) = plan.derived
    assert how.device == "MI355X DPX/NPS2"
    assert {run.mode for run in plan.placements} == {"DPX/NPS2"}
    assert how.replicas * how.requests_per_s_each >= 40


def test_the_order_of_workloads_changes_nothing(tmp_path: Path) -> None:
    body = yaml.safe_load(CHAT)
    other = {**body["workloads"][0], "name": "aside", "load": {**body["workloads"][0]["load"], "requests_per_s": 7}}
    there = parse_workloads(yaml.safe_dump({"workloads": [*body["workloads"], other]}))
    back = parse_workloads(yaml.safe_dump({"workloads": [other, *body["workloads"]]}))
    assert make_plan(fleet(tmp_path, "MI355X"), there) == make_plan(fleet(tmp_path, "MI355X"), back)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"replicas": 2}, "replicas and their size follow from load: leave replicas out"),
        ({"concurrency": 2}, "leave concurrency out"),
        ({"kind": "guardrail"}, "leave kind guardrail out"),
        ({"load": None}, "slo with latencies is of a load"),
        ({"slo": {}}, "slo: give ttft_ms, itl_ms or both"),
        ({"slo": {"itl_mss": 5}}, "slo.itl_mss: unknown key; did you mean itl_ms?"),
        ({"slo": {"itl_ms": -5}}, "slo.itl_ms: Input should be greater than 0"),
        ({"slo": "quick"}, "slo: Input should be 'latency' or 'throughput'"),
        ({"load": {"requests_per_s": 0, "prompt_tokens": 1, "answer_tokens": 1}}, "load.requests_per_s"),
        ({"context": 512}, "context 512 does not hold the 768 tokens"),
        ({"devices": ["MI355X XPX"]}, "devices[0]"),
        ({"pinned": {"node": "node-a", "card": 0}}, "pin them to a node"),
    ],
)
def test_what_cannot_stand_beside_a_load_names_itself(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(WorkloadError) as refused:
        asked(**changed)
    assert named in str(refused.value)


def test_the_verb_prints_how_replicas_came_about(tmp_path: Path) -> None:
    fleet(tmp_path, "MI300X")
    (tmp_path / "w.yaml").write_text(CHAT, encoding="utf-8")
    words = ["plan", str(tmp_path / "MI300X.yaml"), str(tmp_path / "w.yaml")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "not derived from a bound" in refused.output
    done = CliRunner().invoke(app, [*words, "--accept-bound"])
    assert done.exit_code == 0
    assert "Replicas from loads" in done.output
    made = json.loads(CliRunner().invoke(app, [*words, "--accept-bound", "-o", "json"]).stdout)
    assert made["derived"][0]["basis"] == "bound"
