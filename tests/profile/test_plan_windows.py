"""Windows: a plan for each part of the day, and nobody who runs on is moved between two of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from aim_profile.cli.app import app
from aim_profile.nodes.emulated import parse_emulated
from aim_profile.plans.compare import plan_assert
from aim_profile.plans.day import DayPlan, plan_day
from aim_profile.plans.fleet import parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Plan, PlanOptions, dump_plan, load_plan, parse_plan
from aim_profile.plans.steps import plan_steps
from aim_profile.plans.window import DAY_MINUTES, WHOLE_DAY, Window, parts_of_day, window_of
from aim_profile.plans.workload import Workload, WorkloadError, Workloads, parse_workloads, workloads_of
from plan_rules import OPTIONS, QUICK, SLOW, Nodes, broken_rules, fleet_yaml, fleets, jobs

BRIEF = PlanOptions(effort=QUICK)
EXAMPLES = int(os.environ.get("SOAK_PLANS", "6"))
THREE_NODES = "nodes: [{name: n, count: 3, gpu: MI300X, cards: 2, compute_partition: SPX}]"
CHAT = "{name: chat, model: Qwen/Qwen3-32B, precision: bf16, replicas: 2, priority: high}"
OFFICE = '{name: office, memory: 20GiB, replicas: 12, window: "07:00-19:00"}'
TUNE = '{name: tune, kind: finetune, memory: 150GiB, replicas: 4, priority: low, window: "19:00-07:00"}'


def work(*entries: str) -> Workloads:
    return parse_workloads(f"workloads: [{', '.join(entries)}]")


def day_of(*entries: str, fleet: str = THREE_NODES) -> DayPlan:
    return plan_day(parse_fleet(fleet), work(*entries), BRIEF)


def places(plan: Plan, *names: str) -> dict[str, tuple[object, ...]]:
    return {r.id: (r.node, r.devices, r.mode) for r in plan.placements if not names or r.workload in names}


def test_fine_tuning_fills_the_night_and_who_always_runs_stays():
    day = day_of(CHAT, OFFICE, TUNE)
    night, work_day = day.windows
    assert (night.window, work_day.window) == ("19:00-07:00", "07:00-19:00")
    assert {run.workload for run in night.plan.placements} == {"chat", "tune"}
    assert {run.workload for run in work_day.plan.placements} == {"chat", "office"}
    assert night.plan.complete
    assert work_day.plan.complete
    assert places(night.plan, "chat") == places(work_day.plan, "chat")
    # A node is cut anew for the day: what it was is what the night left.
    was = {(card.node, card.card): card.mode for card in night.plan.cards}
    assert all(card.was == was[card.node, card.card] for card in work_day.plan.cards)
    assert work_day.plan.totals.cards_switched == 2


def test_one_window_s_plan_is_a_plan_with_steps_to_the_next_and_an_assert_of_its_own():
    day = day_of(CHAT, OFFICE, TUNE)
    for before, now in day.edges():
        assert parse_plan(dump_plan(now.plan)) == now.plan
        steps = plan_steps(_from(now.plan, before.plan), before.plan).steps
        touched = [name for step in steps if step.action in ("stop", "drain", "place") for name in step.replicas]
        assert not any(name.startswith("chat/") for name in touched)
        assert {name.partition("/")[0] for name in touched} == {"office", "tune"}
    switched = next(card.node for card in day.windows[1].plan.cards if card.mode == "CPX/NPS4")
    cut = parse_emulated(f"version: 1\nname: {switched}\ngpu: MI300X\ncards: 2\npartition: CPX/NPS4\n")
    assert plan_assert(cut, day.at("12:00").plan) == ()
    assert [found.what for found in plan_assert(cut, day.at("23:30").plan)] == ["mode", "mode"]


def _from(plan: Plan, before: Plan) -> Plan:
    """The plan with what its cards are before it, as `steps` reads it off the plan that runs."""
    was = {(card.node, card.card): card.mode for card in before.cards}
    return plan.model_copy(
        update={"cards": tuple(c.model_copy(update={"was": was[c.node, c.card]}) for c in plan.cards)}
    )


def test_overlapping_windows_are_parts_of_their_own_and_who_runs_through_stays():
    late = '{name: late, memory: 60GiB, replicas: 2, priority: low, window: "18:00-23:00"}'
    day = day_of(CHAT, OFFICE, TUNE, late)
    assert [each.window for each in day.windows] == [
        "23:00-07:00",
        "07:00-18:00",
        "18:00-19:00",
        "19:00-23:00",
    ]
    by_start = {each.window[:5]: each.plan for each in day.windows}
    assert places(by_start["07:00"], "office") == places(by_start["18:00"], "office")
    assert places(by_start["19:00"], "tune") == places(by_start["23:00"], "tune")
    assert places(by_start["18:00"], "late") == places(by_start["19:00"], "late")
    assert all(places(plan, "chat") == places(by_start["07:00"], "chat") for plan in by_start.values())
    assert day.at("23:00").window == "23:00-07:00"
    assert day.at("06:59").window == "23:00-07:00"
    assert day.at("07:00").window == "07:00-18:00"


def test_who_comes_again_comes_back_to_its_place():
    """`b` and `c` swap hours, `a` comes twice a day by its window's gap: each finds its own devices again."""
    entries = (
        '{name: a, memory: 150GiB, replicas: 2, window: "12:00-06:00"}',
        '{name: b, memory: 150GiB, replicas: 2, window: "00:00-12:00"}',
        '{name: c, memory: 150GiB, replicas: 2, window: "12:00-00:00"}',
    )
    day = day_of(*entries)
    for name in "abc":
        stood = [places(each.plan, name) for each in day.windows]
        assert all(here == there for here in stood for there in stood if here and there), name


def test_low_priority_makes_way_by_day_where_others_would_have_no_device():
    entries = (
        "{name: batch, memory: 150GiB, replicas: 6, priority: low}",
        '{name: office, memory: 150GiB, replicas: 2, window: "07:00-19:00"}',
    )
    day = day_of(*entries)
    by_day = day.at("12:00").plan
    assert len(places(by_day, "office")) == 2
    assert [left.workload for left in by_day.unplaced] == ["batch"]
    assert len(places(day.at("22:00").plan, "batch")) in (4, 6)


def test_a_relation_to_who_does_not_run_then_does_not_count():
    day = day_of("{name: a, memory: 5GiB, anti_affinity: [b]}", '{name: b, memory: 5GiB, window: "07:00-19:00"}')
    together = day.at("12:00").plan
    assert len({run.node for run in together.placements}) == 2
    assert len(day.at("20:00").plan.placements) == 1


def test_one_plan_is_of_one_part_of_the_day():
    with pytest.raises(WorkloadError, match="workload office: window 07:00-19:00: one plan is of one part") as problem:
        make_plan(parse_fleet(THREE_NODES), work(CHAT, OFFICE), BRIEF)
    assert problem.value.field == "office.window"


@pytest.mark.parametrize(
    ("lines", "field", "words"),
    [
        ('window: "22:00"', "window", 'write from and to as "22:00-06:00"'),
        ("window: 22:00", "window", "in quotes"),
        ("window: 1320", "window", "1320 is no window"),
        ('window: "22:00-06:60"', "window", "22:00-06:60 is no window"),
        ('window: "22:00-24:30"', "window", "later than 24:00"),
        ('window: "06:00-06:00"', "window", "the whole day, or nothing of it: leave window out"),
        ('window: "00:00-24:00"', "window", "the whole day"),
        ('window: "2２:00-06:00"', "window", "is no window"),
        ("window: [22, 6]", "window", "is no window"),
        ('windows: "22:00-06:00"', "windows", "did you mean window?"),
    ],
)
def test_a_wrong_window_names_the_key_and_the_line(lines: str, field: str, words: str):
    with pytest.raises(WorkloadError, match=r"^w\.yaml:4: ") as problem:
        parse_workloads(f"workloads:\n- name: a\n  memory: 5GiB\n  {lines}\n", "w.yaml")
    assert problem.value.field == f"workloads[0].{field}"
    assert words in str(problem.value)


def test_what_windows_say_of_each_other_is_checked():
    with pytest.raises(WorkloadError, match=r"w\.yaml:1: time_zone: no time zone is named 'Europe/Berln'.*Berlin"):
        parse_workloads("time_zone: Europe/Berln\nworkloads: []", "w.yaml")
    needs = '{name: a, memory: 5GiB, affinity: [b]%s}, {name: b, memory: 5GiB, window: "22:00-06:00"}'
    with pytest.raises(WorkloadError, match="b runs only 22:00-06:00, a always: give it a window within that"):
        work(needs % "")
    with pytest.raises(WorkloadError, match="b runs only 22:00-06:00, a 05:00-07:00"):
        work(needs % ', window: "05:00-07:00"')
    assert len(work(needs % ', window: "23:00-05:00"').workloads) == 2
    many = ", ".join(f'{{name: w{n}, memory: 5GiB, window: "00:{n:02d}-12:{n:02d}"}}' for n in range(25))
    with pytest.raises(WorkloadError, match=r"workloads\[24\].window: windows start and end at more than 48 times"):
        work(many)


minutes = st.integers(0, DAY_MINUTES - 1)
some_windows = st.builds(Window, minutes, minutes).filter(lambda window: window.start != window.end)


@given(st.lists(some_windows, max_size=6), minutes)
def test_the_parts_of_a_day_are_a_day(windows: list[Window], minute: int):
    parts = parts_of_day(windows)
    assert sum(part.minutes for part in parts) == DAY_MINUTES
    (part,) = (part for part in parts if part.holds(minute))
    assert parts[0].holds(0)
    for window in windows:
        assert window.covers(part) == window.holds(minute)
        assert window_of(str(window)) == window
    assert WHOLE_DAY.covers(part)


@st.composite
def windowed(draw: st.DrawFn) -> list[Workload]:
    hours = draw(st.lists(st.sampled_from([None, None, "22:00-06:00", "06:00-18:00", "12:00-23:00"]), min_size=6))
    found = [
        workload.model_copy(update={"window": hours[at], "affinity": ()}) for at, workload in enumerate(draw(jobs()))
    ]
    return found if any(workload.window for workload in found) else [
        found[0].model_copy(update={"window": "22:00-06:00"}), *found[1:]
    ]  # fmt: skip


@settings(SLOW, max_examples=EXAMPLES, phases=[Phase.generate])
@given(fleets(), windowed(), OPTIONS)
def test_each_part_keeps_every_rule_and_moves_nobody_without_need(
    nodes: Nodes, asked: list[Workload], options: PlanOptions
):
    day = plan_day(fleet_yaml(nodes), workloads_of(asked), options)
    may_move = {workload.name for workload in asked if workload.may_be_evicted}
    assert plan_day(fleet_yaml(nodes), workloads_of(asked), options) == day
    for each in day.windows:
        minute = window_of(each.window).start if len(day.windows) > 1 else 0
        active = [w for w in asked if w.window is None or window_of(w.window).holds(minute)]
        names = {workload.name for workload in active}
        alone = workloads_of(
            w.model_copy(update={"window": None, "anti_affinity": tuple(n for n in w.anti_affinity if n in names)})
            for w in active
        )
        assert broken_rules(fleet_yaml(nodes), alone, each.plan, options) == []
    moves = [_moved(before.plan, now.plan) - may_move for before, now in day.edges()]
    always = {workload.name for workload in asked if workload.window is None}
    assert not any(moved & always for moved in moves)
    # Where the day closes, who came in before the part that was planned first may have another place than after it.
    assert sum(bool(moved) for moved in moves) <= 1


def _moved(before: Plan, now: Plan) -> set[str]:
    old, new = places(before), places(now)
    return {name.partition("/")[0] for name in old.keys() & new.keys() if old[name] != new[name]}


def test_the_command_writes_and_prints_each_window(tmp_path: Path):
    fleet, asked, out = tmp_path / "f.yaml", tmp_path / "w.yaml", tmp_path / "plan.yaml"
    fleet.write_text("nodes: [{name: n, gpu: MI300X, cards: 2}]", encoding="utf-8")
    hours = {"chat": "priority: high", "office": 'window: "07:00-19:00"', "tune": 'window: "19:00-07:00"'}
    entries = [f"{{name: {name}, memory: 150GiB, {how}}}" for name, how in hours.items()]
    asked.write_text(f"time_zone: Europe/Berlin\nworkloads: [{', '.join(entries)}]", encoding="utf-8")
    found = run("plan", fleet, asked, "--out", out, "--svg", tmp_path / "p.svg")
    assert found.exit_code == 0, found.output
    assert "From 07:00 (07:00-19:00 Europe/Berlin)" in found.stdout
    assert "\nstart   office/0\n" in found.stdout
    files = [tmp_path / f"plan.{window}.yaml" for window in ("1900-0700", "0700-1900")]
    night, work_day = map(load_plan, files)
    assert (tmp_path / "p.1900-0700.svg").read_text(encoding="utf-8").startswith("<svg")
    assert not out.exists()
    assert run("steps", *files).exit_code == 0
    machine = json.loads(run("plan", fleet, asked, "-o", "json").stdout)
    assert [each["window"] for each in machine["windows"]] == ["19:00-07:00", "07:00-19:00"]
    assert parse_plan(json.dumps(machine["windows"][0]["plan"])) == night
    assert parse_plan(run("plan", fleet, asked, "--at", "12:00", "-o", "yaml").stdout) == work_day
    (tmp_path / "day.json").write_text(json.dumps(machine), encoding="utf-8")
    for wrong, words in (
        (("plan", fleet, asked, "--at", "25:00"), "25:00 is no time of day"),
        (("plan", fleet, asked, "--current", files[0]), "a day of windows"),
        (("diff", tmp_path / "day.json", files[0]), "looks like a day of plans"),
    ):
        refused = run(*wrong)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert words in refused.stderr


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
