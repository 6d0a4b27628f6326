"""The planner: its rules hold for any fleet, its priorities and its order-independence too; and it explains itself."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_profile.plans.fleet import parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import PlanOptions
from aim_profile.plans.workload import Workload, parse_workloads, workloads_of
from plan_rules import OPTIONS, SLOW, Nodes, broken_rules, fleet_yaml, fleets, jobs, passed_over, spanning


@SLOW
@given(fleets(), jobs(), OPTIONS)
def test_no_rule_is_ever_broken(nodes: Nodes, asked: list[Workload], options: PlanOptions):
    fleet, workloads = fleet_yaml(nodes), workloads_of(asked)
    plan = make_plan(fleet, workloads, options)
    assert broken_rules(fleet, workloads, plan, options) == []
    assert passed_over(fleet, workloads, plan) == []
    assert spanning(fleet, workloads, plan, options) == []


@SLOW
@given(fleets(), jobs(), OPTIONS, st.randoms(use_true_random=False))
def test_order_never_matters_and_neither_does_chance(
    nodes: Nodes, asked: list[Workload], options: PlanOptions, chance: Random
):
    plan = make_plan(fleet_yaml(nodes), workloads_of(asked), options)
    chance.shuffle(nodes)
    chance.shuffle(asked)
    assert make_plan(fleet_yaml(nodes), workloads_of(asked), options) == plan


@SLOW
@given(fleets(), jobs(), jobs(), OPTIONS, st.booleans())
def test_what_runs_stays_unless_it_may_be_evicted(
    nodes: Nodes, first: list[Workload], second: list[Workload], options: PlanOptions, eviction: bool
):
    options = options.model_copy(update={"allow_mixed_compute": False})
    before = make_plan(fleet_yaml(nodes), workloads_of(first), options)
    # The fleet as the first plan left it.
    modes = {card.node: str(card.mode).split("/") for card in before.cards}
    switched = [
        {**node, "compute_partition": modes[str(node["name"])][0], "memory_partition": modes[str(node["name"])][1]}
        for node in nodes
    ]
    now = fleet_yaml(switched)
    renamed = [w.model_copy(update={"name": f"x{w.name}", "affinity": (), "anti_affinity": ()}) for w in second]
    asked = workloads_of([*first, *renamed])
    again = options.model_copy(update={"allow_eviction": eviction})
    plan = make_plan(now, asked, again, before)
    assert broken_rules(now, asked, plan, again) == []
    after = {placement.id: placement for placement in plan.placements}
    for placement in before.placements:
        if not (eviction and placement.priority == "low"):
            kept = after[placement.id]
            assert (kept.node, kept.devices, kept.mode) == (placement.node, placement.devices, placement.mode)
            assert kept.running


def test_partitions_together_are_for_those_who_ask_or_have_nothing_else():
    fleet = parse_fleet("nodes: [{name: n0, gpu: MI300X, cards: 2, compute_partition: CPX}]")
    asked = "workloads: [{name: w, model: Qwen/Qwen3-32B, precision: bf16%s}]"
    (alone,) = make_plan(fleet, parse_workloads(asked % "")).placements
    assert (alone.tp, "unproven" in alone.reason) == (1, False)
    before = make_plan(fleet, parse_workloads(asked % ", tp: 4"))
    (together,) = before.placements
    assert (together.tp, together.mode) == (4, "CPX/NPS4")
    assert "tensor parallel as asked; which is unproven over partitions" in together.reason
    assert "tensor parallelism over partitions is unproven" in before.notes[0]
    # What runs so stays, and where no node can switch there is nothing else.
    (kept,) = make_plan(fleet, parse_workloads(asked % ""), PlanOptions(), before).placements
    assert (kept.running, kept.devices) == (True, together.devices)
    guest = parse_fleet("nodes: [{name: n0, gpu: MI300X, cards: 2, compute_partition: CPX, deployment: sr-iov}]")
    (placed,) = make_plan(guest, parse_workloads(asked % "")).placements
    assert (placed.tp, placed.mode) == (4, "CPX/NPS4")


def test_partitions_are_put_together_only_where_a_replica_is_left_over_without():
    fleet = parse_fleet("nodes: [{name: n0, gpu: MI300X, cards: 2, compute_partition: CPX}]")
    asked = "workloads: [{name: w, model: Qwen/Qwen3-32B, precision: bf16, replicas: %d}]"
    few, many = (make_plan(fleet, parse_workloads(asked % count)) for count in (4, 5))
    assert few.complete
    assert {(p.mode, p.tp) for p in few.placements} == {("DPX/NPS2", 1)}
    assert len(many.placements) == 4
    mixed = parse_workloads((asked % 3)[:-1] + ", {name: s, memory: 10GiB, replicas: 4}]")
    plan = make_plan(fleet, mixed)
    assert plan.complete
    assert any(p.tp == 4 for p in plan.placements)


CPX = "version: 1\nnodes: [{name: n0, gpu: MI300X, cards: 1, compute_partition: CPX}]"


@pytest.mark.parametrize("eviction", [False, True])
def test_what_runs_on_the_card_it_is_pinned_to_makes_way_for_nobody(eviction: bool):
    fleet = parse_fleet("nodes: [{name: n0, gpu: MI300X, cards: 2}]")
    pinned = "{name: %s, memory: 150GiB, priority: low, pinned: {node: n0, card: 0}}"
    before = make_plan(fleet, parse_workloads(f"workloads: [{pinned % 'a'}]"))
    both = parse_workloads(f"workloads: [{pinned % 'a'}, {pinned % 'b'}]")
    plan = make_plan(fleet, both, PlanOptions(allow_eviction=eviction), before)
    assert [(placed.id, placed.devices, placed.running) for placed in plan.placements] == [("a/0", ((0, 0),), True)]


def test_what_runs_and_may_be_evicted_is_said_to_move():
    fleet = parse_fleet("nodes: [{name: n0, gpu: MI300X, cards: 2}]")
    low = "{name: a, memory: 20GiB, priority: low}"
    before = make_plan(fleet, parse_workloads(f"workloads: [{low}]"))
    both = parse_workloads(
        f"workloads: [{low}, {{name: b, memory: 20GiB, priority: high, pinned: {{node: n0, card: 0}}}}]"
    )
    plan = make_plan(fleet, both, PlanOptions(allow_eviction=True), before)
    assert [(placed.id, placed.devices, placed.running) for placed in plan.placements] == [
        ("a/0", ((1, 0),), False),
        ("b/0", ((0, 0),), False),
    ]
    assert (plan.totals.moved, plan.totals.evicted) == (1, 0)


def test_low_makes_way_for_high_only_where_eviction_is_allowed():
    fleet = parse_fleet(CPX)
    lows = "{name: low, model: Qwen/Qwen3-4B, precision: bf16, replicas: 8, priority: low}"
    before = make_plan(fleet, parse_workloads(f"workloads: [{lows}]"))
    assert before.complete
    both = parse_workloads(
        f"workloads: [{lows}, {{name: high, model: Qwen/Qwen3-4B, precision: bf16, replicas: 3, priority: high}}]"
    )
    kept = make_plan(fleet, both, PlanOptions(), before)
    assert kept.totals.placed == {"high": 0, "medium": 0, "low": 8}
    evicted = make_plan(fleet, both, PlanOptions(allow_eviction=True), before)
    assert evicted.totals.placed == {"high": 3, "medium": 0, "low": 5}
    assert (evicted.totals.evicted, evicted.totals.moved) == (3, 0)
    assert next(left.evicted for left in evicted.unplaced if left.workload == "low") == 3


def test_a_filler_takes_the_gap_and_no_card_of_its_own():
    fleet = parse_fleet("nodes: [{name: n0, gpu: MI300X, cards: 2, compute_partition: CPX}]")
    plan = make_plan(
        fleet,
        parse_workloads(
            "workloads: [{name: chat, model: Qwen/Qwen3-4B, precision: bf16, replicas: 5},"
            "{name: guard, kind: guardrail, memory: 4GiB, replicas: 3}]"
        ),
    )
    assert plan.complete
    assert plan.totals.cards_used == plan.totals.bound == 1


def test_limits_share_a_device_and_high_priority_never_does():
    def cards_used(priority: str) -> int:
        work = f"{{name: a, memory: 80GiB, memory_limit: 86GiB, replicas: 2, priority: {priority}}}"
        fleet = parse_fleet("nodes: [{name: n0, gpu: MI300X, cards: 2}]")
        return make_plan(fleet, parse_workloads(f"workloads: [{work}]")).totals.cards_used

    assert cards_used("low") == 1
    assert cards_used("high") == 2


@pytest.mark.parametrize(
    ("work", "cause", "shortfall", "words"),
    [
        ("{name: a, model: deepseek-ai/DeepSeek-R1}", "too-large", None, "lacks"),
        ("{name: a, memory: 180GiB}", "too-large", 7.215, "lacks 7.215 GiB"),
        ("{name: a, memory: 10GiB, replicas: 20}", "no-room", 40.0, "every device that holds it is taken"),
        ("{name: a, memory: 10GiB, replicas: 2, spread: node}", "constraint", None, "spread over nodes"),
        ("{name: a, memory: 10GiB, node_selector: {zone: z}}", "constraint", None, "zone=z"),
        ("{name: a, memory: 10GiB, tp: 16}", "constraint", None, "tensor parallel 16"),
    ],
)
def test_a_refusal_says_what_is_missing_and_by_how_much(work: str, cause: str, shortfall: float | None, words: str):
    fleet = parse_fleet("nodes: [{name: n0, gpu: MI300X, cards: 2}]")
    (left,) = make_plan(fleet, parse_workloads(f"workloads: [{work}]")).unplaced
    assert left.cause == cause
    assert words in left.reason
    if shortfall is not None:
        assert left.shortfall_gib == pytest.approx(shortfall, abs=0.01)
    if cause == "too-large" and "model" in work:
        assert left.remedies


def test_a_memory_mode_is_changed_only_when_it_must_be():
    fleet = parse_fleet("nodes: [{name: n0, gpu: MI300X, cards: 8}, {name: n1, gpu: MI300X, cards: 8}]")
    few = make_plan(fleet, parse_workloads("workloads: [{name: a, memory: 10GiB, replicas: 16}]"))
    assert (few.totals.cards_used, few.totals.nodes_drained) == (16, 0)
    many = make_plan(fleet, parse_workloads("workloads: [{name: a, memory: 10GiB, replicas: 17}]"))
    assert many.complete
    assert many.totals.nodes_drained == 1
