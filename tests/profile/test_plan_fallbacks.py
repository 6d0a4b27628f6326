"""Fallbacks: taken in their order, only by what has no device as asked, and never at somebody else's cost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from aim_profile.cli.picture import draw, summary
from aim_profile.kubernetes.replicas import wanted_of
from aim_profile.kubernetes.target import RenderError
from aim_profile.plans.fleet import parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Plan, PlanOptions, dump_plan, parse_plan
from aim_profile.plans.workload import Workload, WorkloadError, Workloads, parse_workloads, workloads_of
from model_directory import write_model
from plan_rules import OPTIONS, QUICK, SLOW, Nodes, broken_rules, fleet_yaml, fleets, jobs

EXAMPLES = int(os.environ.get("SOAK_PLANS", "6"))
ONE_CARD = "nodes: [{name: n, gpu: MI300X, cards: 1, compute_partition: SPX}]"
BRIEF = PlanOptions(effort=QUICK)
HOLDER = "{name: first, memory: 150GiB, priority: high}"


def planned(fleet: str, *entries: str, options: PlanOptions = BRIEF, current: Plan | tuple[()] = ()) -> Plan:
    return make_plan(parse_fleet(fleet), work(*entries), options, current)


def work(*entries: str) -> Workloads:
    return parse_workloads(f"workloads: [{', '.join(entries)}]")


def taken(plan: Plan) -> dict[str, int]:
    return {placement.id: placement.fallback for placement in plan.placements}


def test_the_first_form_that_gets_a_device_is_taken_and_said():
    plan = planned(
        ONE_CARD,
        "{name: a, model: meta-llama/Llama-3.3-70B-Instruct, precision: bf16, concurrency: 64, context: 32768,"
        " fallback: [{concurrency: 60}, {precision: fp8, concurrency: 4}, {precision: int4, concurrency: 1}]}",
    )
    (placement,) = plan.placements
    assert (placement.fallback, placement.precision, placement.concurrency) == (2, "fp8", 4)
    assert placement.context == 32768
    assert "in its fallback, precision fp8, concurrency 4" in placement.reason
    assert any("a (precision fp8, concurrency 4)" in note for note in plan.notes)
    assert "1 workload in a fallback" in summary(plan)
    assert "in its fallback 2" in draw(plan)
    assert parse_plan(dump_plan(plan)) == plan


def test_what_has_a_device_as_asked_takes_no_fallback():
    asked = "{name: a, model: Qwen/Qwen3-32B, precision: bf16, fallback: [{precision: fp8}]}"
    plan = planned(ONE_CARD, asked)
    assert taken(plan) == {"a/0": 0}
    assert plan == planned(ONE_CARD, asked.replace(", fallback: [{precision: fp8}]", ""))


def test_an_empty_node_is_switched_for_a_fallback():
    plan = planned(
        "nodes: [{name: n, gpu: MI300X, cards: 1, compute_partition: CPX}]",
        "{name: a, memory: 250GiB, fallback: [{memory: 150GiB}]}",
    )
    assert taken(plan) == {"a/0": 1}
    assert [(card.was, card.mode) for card in plan.cards] == [("CPX/NPS4", "SPX/NPS1")]


def test_all_replicas_of_a_workload_are_in_one_form():
    fleet = "nodes: [{name: n, gpu: MI300X, cards: 2, compute_partition: CPX}]"
    asked = "{name: a, memory: 20GiB, replicas: 17, spread: card, fallback: [{memory: 10GiB}]}"
    assert taken(planned(fleet, asked)) == {"a/0": 0, "a/1": 0}  # no form places more: it stays as asked
    asked = "{name: a, memory: 30GiB, memory_limit: 60GiB, replicas: 3, fallback: [{memory_limit: 50GiB}]}"
    assert taken(planned(ONE_CARD, asked)) == {"a/0": 1, "a/1": 1, "a/2": 1}


@pytest.mark.parametrize("last", ["", ", {memory: 180GiB}"])
def test_a_refusal_says_that_no_fallback_helped(last: str):
    plan = planned(ONE_CARD, HOLDER, f"{{name: b, memory: 100GiB, fallback: [{{memory: 90GiB}}{last}]}}")
    (left,) = plan.unplaced
    assert left.cause == "no-room"
    assert "; fallback 1, memory 90GiB: no room either" in left.reason
    assert ("; fallback 2, memory 180GiB: lacks" in left.reason) == bool(last)


def test_a_fallback_gives_back_what_others_get_as_asked():
    """Two whole cards: `a` gets both only in part; in its fallback it leaves one to `b`, which needs no fallback."""
    fleet = "nodes: [{name: n, gpu: MI300X, cards: 2, compute_partition: SPX}]"
    shared = (
        "{name: a, memory: 80GiB, memory_limit: 160GiB, replicas: 3, fallback: [{memory: 10GiB, memory_limit: 50GiB}]}"
    )
    plan = planned(fleet, shared, "{name: b, memory: 170GiB, priority: low, fallback: [{memory: 100GiB}]}")
    assert taken(plan) == {"a/0": 1, "a/1": 1, "a/2": 1, "b/0": 0}


def test_what_runs_in_a_fallback_stays_in_it():
    asked = "{name: a, memory: 100GiB, priority: low, fallback: [{memory: 40GiB, memory_limit: 50GiB}]}"
    fleet = "nodes: [{name: n, gpu: MI300X, cards: 2, compute_partition: SPX}]"
    before = planned(ONE_CARD, "{name: c, memory: 40GiB, memory_limit: 100GiB}", asked)
    assert taken(before) == {"a/0": 1, "c/0": 0}
    after = planned(fleet, asked, current=before)
    assert [(run.fallback, run.running, run.cards) for run in after.placements] == [(1, True, (0,))]
    assert taken(planned(fleet, asked.replace("40GiB", "41GiB"), current=before)) == {"a/0": 1}
    assert taken(planned(fleet, asked[: asked.index(", fallback")] + "}", current=before)) == {"a/0": 0}


def test_rendering_follows_the_form_that_was_placed():
    asked = work("{name: a, model: Qwen/Qwen3-8B, fallback: [{kv_dtype: fp8, context: 4096}]}").workloads[0]
    plan = make_plan(parse_fleet(ONE_CARD), workloads_of([asked]), BRIEF)
    run = plan.placements[0].model_copy(update={"fallback": 1, "context": 4096})
    assert wanted_of(run, asked).kv_dtype == "fp8"
    with pytest.raises(RenderError, match="placed in fallback 2, the workload names 1"):
        wanted_of(run.model_copy(update={"fallback": 2}), asked)


@pytest.mark.parametrize(
    ("entry", "field", "words"),
    [
        ("fallback: [{precison: fp8}]", "fallback[0].precison", "did you mean precision?"),
        ("fallback: [{precision: fp9}]", "fallback[0].precision", "fp9"),
        ("fallback: [{}]", "fallback[0]", "changes nothing: give one of precision"),
        ("fallback: [{context: 8192}]", "fallback[0]", "context 8192 changes nothing"),
        ("fallback: [{precision: bf16}]", "fallback[0]", "precision bf16 is its own, and changes nothing"),
        ("fallback: [{context: 4096}, {context: 4096}]", "fallback[1]", "is fallback[0] again"),
        ("fallback: [{context: 4096, replicas: 2}]", "fallback[0].replicas", "unknown key"),
        ("fallback: [{memory_limit: 8GiB, tp: 2}]", "fallback[0]", "tp must be 1"),
        ("fallback: [{memory: 5Gx}]", "fallback[0].memory", "5Gx"),
        ("fallback: {precision: fp8}", "fallback", "tuple"),
        (f"fallback: [{', '.join(f'{{context: {n}}}' for n in range(1, 10))}]", "fallback", "at most 8"),
    ],
)
def test_a_wrong_fallback_names_the_key_and_the_line(entry: str, field: str, words: str):
    with pytest.raises(WorkloadError, match=r"^w\.yaml:4: ") as problem:
        parse_workloads(f"workloads:\n- name: a\n  model: Qwen/Qwen3-4B\n  {entry}", "w.yaml")
    assert problem.value.field == f"workloads[0].{field}"
    assert words in str(problem.value)


def test_a_fallback_is_refused_where_there_is_nothing_to_change():
    for entry, words in (
        ("memory: 5GiB, fallback: [{precision: fp8}]", "precision is of a model"),
        (
            "kind: finetune, training: {model: Qwen/Qwen3-4B}, fallback: [{memory: 5GiB}]",
            "a training has no other form",
        ),
    ):
        with pytest.raises(WorkloadError, match=words):
            work(f"{{name: a, {entry}}}")


def test_files_that_hold_one_precision_are_not_had_in_another(tmp_path: Path):
    write_model(tmp_path, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 64})
    with pytest.raises(WorkloadError, match=r"fallback\[0\].*cannot be served as fp8"):
        work(f"{{name: a, model: {tmp_path}, fallback: [{{precision: fp8}}]}}")


def test_planning_names_the_fallback_that_cannot_be_sized():
    with pytest.raises(WorkloadError, match=r"workload a: fallback\[0\]: ") as problem:
        planned(ONE_CARD, "{name: a, model: Qwen/Qwen3-4B, fallback: [{tp: 3}]}")
    assert problem.value.field == "a.fallback[0].tp"


FORMS = ({"context": 1024}, {"precision": "int4"}, {"memory": "2GiB"}, {"memory": "2GiB", "memory_limit": "3GiB"})


@st.composite
def jobs_with_fallbacks(draw: st.DrawFn) -> list[Workload]:
    found = []
    for workload in draw(jobs()):
        wanted = draw(st.lists(st.sampled_from(FORMS), max_size=2, unique_by=str))
        usable = [form for form in wanted if workload.model or "memory" in form]
        changed = workload.model_dump(exclude_defaults=True) | {"fallback": usable}
        try:
            found.append(Workload.model_validate(changed))
        except ValueError:  # a form like the first, or one that cannot be: refused, which has its own test
            found.append(workload)
    return found


@settings(SLOW, max_examples=EXAMPLES, phases=[Phase.generate])
@given(fleets(), jobs_with_fallbacks(), OPTIONS)
def test_nobody_pays_for_a_fallback(nodes: Nodes, asked: list[Workload], options: PlanOptions):
    fleet = fleet_yaml(nodes)
    without = make_plan(fleet, workloads_of(w.model_copy(update={"fallback": ()}) for w in asked), options)
    plan = make_plan(fleet, workloads_of(asked), options)
    forms = {run.workload: run.fallback for run in plan.placements}
    assert all(run.fallback == forms[run.workload] for run in plan.placements)
    in_form = workloads_of(w.forms[forms[w.name] - 1] if forms.get(w.name) else w for w in asked)
    assert broken_rules(fleet, in_form, plan, options) == []
    short = {left.workload for left in without.unplaced}
    assert {name for name, number in forms.items() if number} <= short
    for workload in asked:
        before, after = _count(without, workload.name), _count(plan, workload.name)
        assert after > before if forms.get(workload.name) else after >= before
    kept = [run for run in without.placements if run.workload not in short]
    assert all((run.node, run.mode) in {(p.node, p.mode) for p in plan.placements} for run in kept)


def _count(plan: Plan, name: str) -> int:
    return sum(run.workload == name for run in plan.placements)
