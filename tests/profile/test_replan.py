"""Planning again changes as little as possible: who had a place keeps it, and no rule is broken on the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from aim_profile.cli.app import app
from aim_profile.plans.fleet import Fleet, parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Plan, PlanError, PlanOptions, dump_plan, parse_plan
from aim_profile.plans.replan import Replanned, replan
from aim_profile.plans.settled import in_the_modes_of
from aim_profile.plans.workload import Workload, Workloads, parse_workloads, workloads_of
from plan_rules import OPTIONS, QUICK, SLOW, Nodes, broken_rules, fleet_yaml, fleets, jobs

BRIEF = PlanOptions(effort=QUICK)
EXAMPLES = int(os.environ.get("SOAK_PLANS", "6"))
TWO_NODES = "nodes: [{name: n, count: 2, gpu: MI300X, cards: 2, compute_partition: SPX}]"


def work(*entries: str) -> Workloads:
    return parse_workloads(f"workloads: [{', '.join(entries)}]")


def places(plan: Plan) -> dict[str, tuple[object, ...]]:
    return {run.id: (run.node, run.devices, run.mode) for run in plan.placements}


def again(fleet: str, plan: Plan, *entries: str, options: PlanOptions = BRIEF) -> Replanned:
    """Planned again, as anybody would who read the plan from its file."""
    found = replan(parse_fleet(fleet), work(*entries), plan, options)
    assert parse_plan(dump_plan(found.plan)) == found.plan
    return found


def test_one_workload_more_moves_nobody():
    asked = ("{name: a, memory: 20GiB, replicas: 9}", "{name: b, memory: 150GiB}")
    plan = make_plan(parse_fleet(TWO_NODES), work(*asked), BRIEF)
    found = again(TWO_NODES, plan, *asked, "{name: c, memory: 20GiB, replicas: 3}")
    assert found.started == ("c/0", "c/1", "c/2")
    assert (found.stays, found.stopped, found.moved, found.changed) == (10, (), {}, {})
    assert found.local is True
    assert {name: at for name, at in places(found.plan).items() if not name.startswith("c")} == places(plan)
    assert all(run.running is not run.id.startswith("c") for run in found.plan.placements)
    # What the plan before switched is no switch of this one.
    assert found.plan.totals.nodes_drained == 0
    assert [card.was for card in found.plan.cards] == [card.mode for card in plan.cards]


def test_a_card_more_beside_cards_in_several_modes_moves_nobody():
    options = BRIEF.model_copy(update={"allow_mixed_compute": True})
    fleet = "nodes: [{{name: n, gpu: MI355X, cards: {}, compute_partition: SPX}}]"
    asked = ("{name: a, memory: 120GiB, priority: high}", "{name: b, memory: 60GiB, replicas: 4, priority: high}")
    plan = make_plan(parse_fleet(fleet.format(2)), work(*asked), options)
    assert sorted(card.mode or "" for card in plan.cards) == ["DPX/NPS2", "QPX/NPS2"]
    found = again(fleet.format(3), plan, *asked, "{name: c, memory: 120GiB, replicas: 2}", options=options)
    assert (found.moved, found.started) == ({}, ("c/0", "c/1"))


def test_planning_again_for_the_same_is_the_same():
    asked = ("{name: a, memory: 20GiB, replicas: 9}", "{name: b, memory: 150GiB}", "{name: c, memory: 900GiB}")
    plan = make_plan(parse_fleet(TWO_NODES), work(*asked), BRIEF)
    once = again(TWO_NODES, plan, *asked)
    assert places(once.plan) == places(plan)
    assert once.plan.unplaced == plan.unplaced
    assert again(TWO_NODES, once.plan, *asked).plan == once.plan


def test_who_loses_a_node_moves_and_it_is_said_why():
    asked = ("{name: a, memory: 150GiB, replicas: 2, spread: node}", "{name: b, memory: 150GiB}")
    plan = make_plan(parse_fleet(TWO_NODES), work("{name: a, memory: 150GiB, replicas: 2}"), BRIEF)
    assert {run.node for run in plan.placements} == {"n-0"}
    one = "nodes: [{name: n-1, gpu: MI300X, cards: 2, compute_partition: SPX}]"
    found = again(one, plan, "{name: a, memory: 150GiB, replicas: 2}")
    assert set(found.moved) == {"a/0", "a/1"}
    assert found.moved["a/0"].endswith("n-0 is gone")
    assert found.stays == 0
    found = again(TWO_NODES, plan, *asked)  # one of two on a node may not stand there any more
    assert [why.rpartition(": ")[2] for why in found.moved.values()] == ["it may not stand there any more"]


CUT_AND_WHOLE = """nodes:
- {name: cut, gpu: MI300X, cards: 1, compute_partition: CPX}
- {name: whole, gpu: MI300X, cards: 1, compute_partition: SPX}
"""


def test_a_workload_that_grows_moves_alone():
    plan = make_plan(parse_fleet(CUT_AND_WHOLE), work("{name: a, memory: 20GiB}", "{name: b, memory: 20GiB}"), BRIEF)
    found = again(CUT_AND_WHOLE, plan, "{name: a, memory: 150GiB}", "{name: b, memory: 20GiB}")
    assert list(found.moved) == ["a/0"]
    assert "it takes 1 x 150.0 GiB now, not 1 x 20.0" in found.moved["a/0"]
    smaller = again(CUT_AND_WHOLE, plan, "{name: a, memory: 20GiB, priority: low}", "{name: b, memory: 19GiB}")
    assert (smaller.moved, smaller.changed, smaller.stays) == ({}, {}, 2)
    assert [run.need_gib for run in smaller.plan.placements] == [20.0, 19.0]
    assert smaller.plan.placements[0].priority == "low"


def test_a_replica_that_starts_anew_in_its_place_is_named():
    def asked(context: int) -> str:
        return f"{{name: a, model: Qwen/Qwen3-4B, context: {context}}}"

    plan = make_plan(parse_fleet(TWO_NODES), work(asked(4096)), BRIEF)
    found = again(TWO_NODES, plan, asked(2048))
    assert found.changed == {"a/0": "context 4096 → 2048"}


FULL = ("{name: low, memory: 150GiB, replicas: 4, priority: low}",)
NEW = "{name: new, memory: 150GiB, priority: high}"


def test_a_full_fleet_says_what_a_plan_from_scratch_would_do():
    plan = make_plan(parse_fleet(TWO_NODES), work(*FULL), BRIEF)
    found = again(TWO_NODES, plan, *FULL, NEW)
    assert [left.workload for left in found.plan.unplaced] == ["new"]
    assert found.stays == 4
    assert "left new/0 without a device" in found.why
    assert "nothing else can be tried; a plan from scratch would place 1 more high" in found.why
    assert "--allow-eviction" in found.why
    # Asked the same again there is nothing new to say, and nothing to look for.
    assert again(TWO_NODES, found.plan, *FULL, NEW).why == "everything else has its place as before"


def test_low_priority_makes_way_where_that_is_allowed_and_the_whole_planner_says_so():
    plan = make_plan(parse_fleet(TWO_NODES), work(*FULL), BRIEF)
    found = again(TWO_NODES, plan, *FULL, NEW, options=BRIEF.model_copy(update={"allow_eviction": True}))
    assert found.local is False
    assert "so the whole planner looked: it placed more" in found.why
    assert (found.started, len(found.stopped)) == (("new/0",), 1)


def test_a_refusal_counts_what_stands_on_the_whole_fleet():
    plan = make_plan(parse_fleet(TWO_NODES), work(*FULL), BRIEF)
    found = again(TWO_NODES, plan, *FULL, NEW).plan.unplaced[0]
    assert found == make_plan(parse_fleet(TWO_NODES), work(*FULL, NEW), BRIEF, plan).unplaced[0]
    assert "4 low" in found.remedies[1]


def test_what_was_without_a_device_gets_the_first_that_comes_free():
    plan = make_plan(parse_fleet(TWO_NODES), work(*FULL, NEW.replace("high", "low")), BRIEF)
    (left,) = plan.unplaced
    more = TWO_NODES.replace("count: 2", "count: 3")
    found = again(more, plan, *FULL, NEW.replace("high", "low"))
    assert found.started == (f"{left.workload}/{left.replicas[0]}",)
    assert found.plan.complete


def test_a_previous_plan_s_modes_hold_whatever_the_fleet_file_says_and_its_sizes_do_not():
    plan = make_plan(parse_fleet(TWO_NODES), work("{name: a, memory: 20GiB, replicas: 9}"), BRIEF)
    now = in_the_modes_of(parse_fleet(TWO_NODES), plan)
    assert [card.current for node in now.nodes for card in node.cards] == [card.mode for card in plan.cards]
    assert {card.current for node in now.nodes for card in node.cards} == {"SPX/NPS1", "CPX/NPS4"}
    other = parse_fleet(TWO_NODES.replace("MI300X", "MI355X"))
    assert in_the_modes_of(other, plan) == other


OTHER = ["card more", "replica more"]


@st.composite
def changes(draw: st.DrawFn) -> tuple[Nodes, list[Workload], Nodes, list[Workload]]:
    nodes, asked = draw(fleets()), draw(jobs())
    after, wanted = list(nodes), list(asked)
    what = draw(
        st.sampled_from(["workload more", "workload less", "node more", "node less", "card more", "replica more"])
    )
    if what == "workload more":
        wanted.append(draw(jobs())[0].model_copy(update={"name": "new"}))
    elif what == "workload less":
        gone = draw(st.sampled_from([workload.name for workload in asked]))
        others = [w for w in asked if w.name != gone]
        wanted = [_without(workload, gone) for workload in others]
    elif what == "node more":
        after.append({**nodes[0], "name": "n9"})
    elif what == "node less":
        pinned = {w.pinned.node for w in asked if w.pinned}
        after = [node for node in nodes if node["name"] in pinned] or nodes[1:] or nodes
    elif what == "card more":
        after[-1] = {**nodes[-1], "cards": int(str(nodes[-1]["cards"])) + 1}
    else:
        wanted[0] = wanted[0].model_copy(update={"replicas": wanted[0].replicas + 1})
    return nodes, asked, after, wanted


def _without(workload: Workload, gone: str) -> Workload:
    left = {key: tuple(n for n in getattr(workload, key) if n != gone) for key in ("affinity", "anti_affinity")}
    return workload.model_copy(update=left)


@settings(SLOW, max_examples=EXAMPLES, phases=[Phase.generate])
@given(changes(), OPTIONS)
def test_whoever_may_stay_stays_and_no_rule_is_broken(
    change: tuple[Nodes, list[Workload], Nodes, list[Workload]], options: PlanOptions
):
    nodes, asked, after, wanted = change
    before = make_plan(fleet_yaml(nodes), workloads_of(asked), options)
    fleet, workloads = fleet_yaml(after), workloads_of(wanted)
    found = replan(fleet, workloads, before, options)
    now = in_the_modes_of(fleet, before)
    assert broken_rules(now, workloads, found.plan, options) == []
    assert parse_plan(dump_plan(found.plan)) == found.plan
    assert replan(fleet, workloads, before, options) == found
    old, new = places(before), places(found.plan)
    assert set(found.started) == new.keys() - old.keys()
    assert set(found.stopped) == old.keys() - new.keys()
    assert {name for name in old.keys() & new.keys() if old[name] != new[name]} == set(found.moved)
    there = {(node.name, card.index): card.current for node in now.nodes for card in node.cards}
    replicas = {w.name: w.replicas for w in wanted}
    for run in before.placements:
        kept_cards = all(there.get((run.node, card)) == run.mode for card in run.cards)
        if kept_cards and run.replica < replicas.get(run.workload, 0):
            assert new.get(run.id) == old[run.id], run.id
    _holds_against_a_fresh_plan(now, workloads, options, found, before)


def _holds_against_a_fresh_plan(
    now: Fleet, workloads: Workloads, options: PlanOptions, found: Replanned, before: Plan
) -> None:
    """No high or medium replica that is newly without a device is passed over in silence."""
    known = {f"{left.workload}/{n}" for left in before.unplaced for n in left.replicas}
    missing = [
        f"{left.workload}/{n}" for left in found.plan.unplaced if left.cause != "too-large" for n in left.replicas
    ]
    new = [name for name in missing if name not in known]
    assert not new or "without a device" in found.why
    fresh = make_plan(now, workloads, options).totals.placed
    placed = found.plan.totals.placed
    if new and (fresh["high"], fresh["medium"]) > (placed["high"], placed["medium"]):
        assert "a plan from scratch would place" in found.why


@pytest.mark.parametrize("cut", ["unplaced", "cards"])
def test_a_previous_plan_that_lacks_something_is_taken_for_what_it_says(cut: str):
    asked = ("{name: a, memory: 20GiB}",)
    plan = make_plan(parse_fleet(TWO_NODES), work(*asked), BRIEF)
    less = plan.model_copy(update={"placements": (), cut: ()})
    assert again(TWO_NODES, less, *asked).started == ("a/0",)


def test_the_command_prints_what_changes_and_why(tmp_path: Path):
    files = {name: tmp_path / f"{name}.yaml" for name in ("fleet", "work", "more", "plan")}
    files["fleet"].write_text(CUT_AND_WHOLE, encoding="utf-8")
    files["work"].write_text("workloads: [{name: a, memory: 20GiB}]", encoding="utf-8")
    files["more"].write_text("workloads: [{name: a, memory: 150GiB}, {name: b, memory: 20GiB}]", encoding="utf-8")
    plan = make_plan(parse_fleet(CUT_AND_WHOLE), work("{name: a, memory: 20GiB}"), BRIEF)
    files["plan"].write_text(dump_plan(plan), encoding="utf-8")
    asked = ("plan", files["fleet"], files["more"], "--previous", files["plan"])
    table = run(*asked)
    assert table.exit_code == 0, table.output
    assert "b/0" in next(line for line in table.stdout.splitlines() if line.startswith("start "))
    assert "it takes 1 x 150.0 GiB now" in table.stdout
    written = run(*asked, "-o", "json")
    assert parse_plan(written.stdout).complete
    assert "move: a/0" in written.stderr
    for other in (("--current", files["plan"]), ("--exact",)):
        refused = run(*asked, *other)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert "--previous already says that" in refused.stderr


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_partitions_are_put_together_only_where_nothing_else_is_left():
    fleet = "nodes: [{name: n, gpu: MI300X, cards: 1, compute_partition: CPX, deployment: sr-iov}, %s]"
    whole = "{name: w, gpu: MI300X, cards: 1, compute_partition: SPX, deployment: sr-iov}"
    asked = ("{name: a, model: Qwen/Qwen3-32B, precision: bf16, priority: high}",)
    plan = make_plan(parse_fleet(fleet % whole), work(*asked), BRIEF)
    assert [run.mode for run in plan.placements] == ["SPX/NPS1"]
    more = again(fleet % whole, plan, *asked, asked[0].replace("name: a", "name: b"))
    assert [(run.id, run.mode, run.tp > 1) for run in more.plan.placements] == [
        ("a/0", "SPX/NPS1", False),
        ("b/0", "CPX/NPS4", True),
    ]
    assert more.local is True


def test_who_is_pinned_to_a_card_that_somebody_keeps_has_no_device():
    one = "nodes: [{name: n, gpu: MI300X, cards: 2, compute_partition: SPX}]"
    first, pinned = "{name: a, memory: 150GiB}", "{name: p, memory: 150GiB, pinned: {node: n, card: 0}}"
    plan = make_plan(parse_fleet(one), work(first), BRIEF)
    found = again(one, plan, first, pinned)
    assert places(found.plan) == places(plan)
    assert found.plan.unplaced[0].reason == "pinned to n card 0, where nothing that holds it is free"


def test_a_plan_of_other_nodes_is_refused():
    plan = make_plan(parse_fleet(TWO_NODES), work("{name: a, memory: 20GiB}"), BRIEF)
    with pytest.raises(PlanError, match="the fleet has no n-0") as problem:
        again(TWO_NODES.replace("name: n", "name: other"), plan, "{name: a, memory: 20GiB}")
    assert problem.value.field == "previous"


def test_what_only_planning_refuses_is_said_with_its_line(tmp_path: Path):
    (tmp_path / "f.yaml").write_text(TWO_NODES, encoding="utf-8")
    asked = tmp_path / "w.yaml"
    for text, line, words in (
        ("- {name: b, memory: 5GiB}\n- name: a\n  model: Qwen/Qwen3-4B\n  tp: 3", 5, "tensor parallel 3"),
        ("- name: a\n  memory: 5GiB\n  pinned:\n    node: nowhere", 5, "nowhere"),
        ("- name: a\n  model: Qwen/Qwen3-4B\n  fallback:\n  - {context: 99}\n  - {tp: 3}", 6, "fallback[1]: Qwen"),
    ):
        asked.write_text(f"workloads:\n{text}\n", encoding="utf-8")
        refused = run("plan", tmp_path / "f.yaml", asked)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert refused.stderr.startswith(f"aim-profile: {asked}:{line}: workload a: ")
        assert words in refused.stderr
