"""Plans for machines without a GPU: one model on one CPU set, alone in the fleet or beside GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.nodes.emulated import parse_emulated
from aim_profile.nodes.facts import Node
from aim_profile.nodes.read import emulate
from aim_profile.plans.compare import plan_assert
from aim_profile.plans.fleet import fleet_of
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Plan, PlanError, PlanOptions, dump_plan, parse_plan
from aim_profile.plans.steps import plan_steps
from aim_profile.plans.workload import Workload, WorkloadError, workloads_of
from aim_profile.units import MIB

RUNNER = CliRunner()


def cpu_node(partitions: int = 4, memory: str = "4GiB", name: str = "edge") -> Node:
    head = f"version: 1\nkind: cpu\nname: {name}\n"
    return parse_emulated(f"{head}cores: 2\nmemory: {memory}\npartitions: {partitions}\nshare_cpus: true\n")


def workload(name: str, model: Path | str | None, **more: object) -> Workload:
    return Workload.model_validate(
        {"name": name, "model": None if model is None else str(model), "context": 1024, **more}
    )


def planned(nodes: list[Node], *workloads: Workload, **options: object) -> Plan:
    return make_plan(fleet_of(nodes), workloads_of(workloads), PlanOptions.model_validate(options))


@pytest.mark.parametrize("exact", [False, True])
def test_each_replica_of_a_gguf_gets_a_cpu_set_of_its_own(embedded_model: Path, exact: bool):
    if exact:
        pytest.importorskip("ortools")
    plan = planned([cpu_node()], *(workload(name, embedded_model) for name in "abc"), exact=exact)
    assert plan.complete
    assert sorted((p.cards, p.partitions, p.mode, p.tp) for p in plan.placements) == [
        ((0,), (at,), "CPU", 1) for at in range(3)
    ]
    (card,) = plan.cards
    assert (card.gpu, card.mode, card.was, card.partitions, card.device_memory_mib) == ("cpu", "CPU", "CPU", 4, 1024)
    assert (card.switchable, card.compute, card.memory, card.changes_memory) == (False, None, None, False)
    assert plan.notes == ()
    need_mib = plan.placements[0].need_gib * 1024
    assert 300 < need_mib < 450, "llama.cpp's overhead, not vLLM's 2.3 GiB"
    assert parse_plan(dump_plan(plan)) == plan


def test_what_is_too_large_is_refused_with_the_shortfall_and_what_would_do(embedded_model: Path):
    plan = planned([cpu_node(memory="1600MiB")], workload("a", embedded_model, context=8192, concurrency=4))
    (missing,) = plan.unplaced
    assert (missing.cause, missing.replicas) == ("too-large", (0,))
    assert missing.shortfall_gib
    assert missing.shortfall_gib > 0
    assert any("MiB of memory" in remedy for remedy in missing.remedies)


def test_more_replicas_than_sets_are_left_over(embedded_model: Path):
    plan = planned([cpu_node(2)], workload("a", embedded_model, replicas=5))
    (missing,) = plan.unplaced
    assert (len(plan.placements), missing.cause, missing.remedies[0]) == (2, "no-room", "add 3 CPU sets of 2048 MiB")


def test_two_that_have_limits_share_a_set(embedded_model: Path):
    two = [workload(name, embedded_model, memory_limit="600MiB") for name in "ab"]
    plan = planned([cpu_node(1, "2GiB")], *two)
    assert {(p.partitions, p.memory_limit_gib) for p in plan.placements} == {((0,), 0.586)}


def test_tensor_parallelism_is_possible_on_no_cpu_set(embedded_model: Path):
    plan = planned([cpu_node()], workload("a", embedded_model, tp=2))
    assert [missing.cause for missing in plan.unplaced] == ["constraint"]
    assert "tensor parallel 2 is possible on no card" in plan.unplaced[0].reason


def test_what_llama_cpp_cannot_do_is_refused_by_the_workloads_name(embedded_model: Path):
    with pytest.raises(WorkloadError, match=r"workload a: .* the file holds q4_1, it cannot be served as fp8"):
        planned([cpu_node()], workload("a", embedded_model, precision="fp8"))


def test_beside_gpus_cpu_sets_get_only_ggufs_and_what_is_pinned_there(embedded_model: Path):
    nodes = [cpu_node(4, "64GiB"), emulate("MI210", 1, name="gpu")]
    asked = [
        workload("gguf", embedded_model, pinned={"node": "edge"}),
        workload("chat", "Qwen/Qwen2.5-0.5B-Instruct"),
        workload("other", "Qwen/Qwen2.5-0.5B-Instruct"),
        workload("here", "Qwen/Qwen2.5-0.5B-Instruct", pinned={"node": "edge"}),
        workload("guard", None, memory="2GiB"),
    ]
    plan = planned(nodes, *asked)
    places = {p.workload: p.node for p in plan.placements}
    assert (places["gguf"], places["here"]) == ("edge", "edge")
    assert {places.get(name) for name in ("chat", "other", "guard")} <= {"gpu", None}
    assert {missing.cause for missing in plan.unplaced} == {"no-room"}


def test_a_gpu_fleet_is_planned_as_it_was_with_a_cpu_node_beside_it():
    gpu = emulate("MI300X", 2, "CPX/NPS4", name="gpu")
    asked = [workload(f"w{at}", "meta-llama/Llama-3.1-8B-Instruct") for at in range(4)]
    alone, beside = planned([gpu], *asked), planned([gpu, cpu_node()], *asked)
    assert beside.placements == alone.placements
    assert [card for card in beside.cards if card.gpu != "cpu"] == list(alone.cards)
    assert all(step.node != "edge" for step in plan_steps(beside).steps)


def test_a_node_is_as_planned_while_what_stands_on_it_fits(embedded_model: Path):
    """What is free on a machine changes every second: a little less is no difference, too little is one."""
    node = cpu_node(2, "4GiB")
    plan = planned([node], workload("a", embedded_model))

    def with_memory(mib: int) -> Node:
        card = node.cards[0]
        parts = tuple(part.model_copy(update={"memory_mib": mib}) for part in card.partitions)
        return node.model_copy(update={"cards": (card.model_copy(update={"partitions": parts}),)})

    assert plan_assert(node, plan) == ()
    assert plan_assert(with_memory(1900), plan) == ()
    (difference,) = plan_assert(with_memory(300), plan)
    assert (difference.what, "a/0 in partition 0" in difference.planned) == ("memory", True)
    (difference,) = plan_assert(cpu_node(3, "6GiB"), plan)
    assert difference.what == "partitions"
    (difference,) = plan_assert(emulate("MI210", 1, name="edge"), plan)
    assert (difference.what, difference.planned, difference.found) == ("product", "cpu", "MI210")


def test_sets_of_different_sizes_are_planned_by_the_smallest(embedded_model: Path):
    node = parse_emulated(
        "version: 1\nkind: cpu\npartitions: [{cpus: [0], memory: 300MiB}, {cpus: [1], memory: 8GiB}]\n"
    )
    plan = planned([node], workload("a", embedded_model))
    assert plan.cards[0].device_memory_mib * MIB == 300 * MIB
    assert plan.unplaced


@pytest.mark.parametrize(("gpu", "mode"), [("cpu", "CPX/NPS4"), ("MI300X", "CPU")])
def test_a_plan_that_mixes_up_the_modes_is_refused(embedded_model: Path, gpu: str, mode: str):
    text = dump_plan(planned([cpu_node()], workload("a", embedded_model)))
    wrong = text.replace("gpu: cpu", f"gpu: {gpu}").replace("mode: CPU", f"mode: {mode}")
    with pytest.raises(PlanError, match=r"plan:\d+: cards\[0\].*: mode .* is none of"):
        parse_plan(wrong)


def test_the_verbs_plan_assert_steps_and_render(tmp_path: Path, embedded_model: Path):
    (tmp_path / "edge.yaml").write_text(
        "version: 1\nkind: cpu\nname: edge\ncores: 2\nmemory: 4GiB\npartitions: 4\nshare_cpus: true\n"
    )
    (tmp_path / "fleet.yaml").write_text("version: 1\nnodes:\n- {file: edge.yaml}\n")
    asked = {"version": 1, "workloads": [{"name": "chat", "model": str(embedded_model), "replicas": 4}]}
    (tmp_path / "workloads.yaml").write_text(yaml.safe_dump(asked))
    plan, svg = tmp_path / "plan.yaml", tmp_path / "plan.svg"

    def run(*words: object) -> tuple[int, str]:
        result = RUNNER.invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
        return result.exit_code, result.output

    fleet, workloads = tmp_path / "fleet.yaml", tmp_path / "workloads.yaml"
    code, output = run("plan", fleet, workloads, "--out", plan, "--svg", svg)
    assert (code, "4 of 4 replicas placed" in output, "validated by AMD" in output) == (0, True, False)
    assert "CPU" in svg.read_text()
    assert run("assert", plan, "--node", tmp_path / "edge.yaml")[0] == 0
    code, output = run("steps", fleet, plan)
    assert (code, "start chat/0 on edge card 0 partition 0 (CPU)" in output) == (0, True)
    code, output = run("render", plan)
    assert (code, "not rendered: chat: on the CPU sets of edge, not on a GPU" in output) == (0, True)
