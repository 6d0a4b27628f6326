"""Plan → steps → emulated nodes → assert: the way is complete, and a switch that did not happen is caught."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_profile.errors import AimProfileError
from aim_profile.nodes.read import Node, emulate
from aim_profile.plans.compare import plan_assert, plan_diff
from aim_profile.plans.fleet import fleet_of
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Placement, Plan, PlanError, PlanOptions
from aim_profile.plans.running import Running
from aim_profile.plans.steps import Step, plan_steps
from aim_profile.plans.walk import StepError, apply_steps
from aim_profile.plans.workload import Workloads, parse_workloads
from emulated_executor import EmulatedNodes, switched

SMALL = "{name: small, model: Qwen/Qwen3-4B, precision: bf16, replicas: 40}"
LARGE = "{name: large, model: Qwen/Qwen3-32B, precision: bf16, replicas: 3}"


def three_nodes(*partitions: str) -> list[Node]:
    return [emulate("MI300X", 4, partition, name=f"n{at}") for at, partition in enumerate(partitions)]


def work(*entries: str) -> Workloads:
    return parse_workloads(f"workloads: [{', '.join(entries)}]")


def differences(executor: EmulatedNodes, plan: Plan) -> list[str]:
    return [d.message for node in executor.nodes.values() for d in plan_assert(node, plan)]


def test_the_round_trip_ends_where_the_plan_says():
    nodes = three_nodes("SPX/NPS1", "SPX/NPS1", "SPX/NPS1")
    plan = make_plan(fleet_of(nodes), work(SMALL, LARGE))
    assert plan.complete
    assert plan.totals.nodes_drained == 2
    executor = EmulatedNodes(nodes, plan)
    assert differences(executor, plan)
    steps = plan_steps(plan)
    apply_steps(steps, plan, executor)
    assert differences(executor, plan) == []
    assert executor.running == {placement.id: placement for placement in plan.placements}
    assert sorted(executor.switches) == sorted(set(executor.switches))
    assert not executor.drained
    for node in executor.switches:
        actions = [step.action for step in steps.steps if step.node == node]
        assert actions == ["drain", "switch", "verify", "refresh", "await", "undrain", "place"]
    assert json.loads(steps.config_json)["gpu-config-profiles"]["cpx-nps4-x4"]["profiles"] == [
        {"computePartition": "CPX", "memoryPartition": "NPS4", "numGPUsAssigned": 4}
    ]


def test_a_switch_that_reports_success_and_did_not_happen_is_caught_before_anything_is_placed():
    nodes = three_nodes("SPX/NPS1", "SPX/NPS1", "SPX/NPS1")
    plan = make_plan(fleet_of(nodes), work(SMALL, LARGE))
    steps = plan_steps(plan)
    liar = next(step.node for step in steps.steps if step.action == "switch")
    executor = EmulatedNodes(nodes, plan, lies={liar})
    with pytest.raises(StepError, match="should be CPX/NPS4, is SPX/NPS1") as problem:
        apply_steps(steps, plan, executor)
    assert problem.value.step.action == "verify"
    assert executor.drained == {liar}
    assert not [placement for placement in executor.running.values() if placement.node == liar]


def test_a_device_plugin_that_does_not_see_the_switch_is_caught_before_anything_is_placed():
    nodes = three_nodes("SPX/NPS1", "SPX/NPS1", "SPX/NPS1")
    plan = make_plan(fleet_of(nodes), work(SMALL, LARGE))
    steps = plan_steps(plan)
    stuck = next(step.node for step in steps.steps if step.action == "switch")
    executor = EmulatedNodes(nodes, plan, stuck={stuck})
    with pytest.raises(
        StepError, match=r"allocatable should be amd\.com/cpx_nps4: 32, is amd\.com/spx_nps1: 4"
    ) as problem:
        apply_steps(steps, plan, executor)
    assert problem.value.step.action == "await"
    assert "device plugin's log" in problem.value.remedy
    assert stuck in executor.drained
    assert not [placement for placement in executor.running.values() if placement.node == stuck]


def test_the_single_strategy_waits_for_its_one_resource_and_the_label_pods_select_by():
    nodes = three_nodes("SPX/NPS1", "SPX/NPS1")
    plan = make_plan(fleet_of(nodes), work(SMALL))
    step = next(step for step in plan_steps(plan, strategy="single").steps if step.action == "await")
    assert step.allocatable == {"amd.com/gpu": 32}
    assert step.await_labels == {"amd.com/gpu.compute-memory-partition": "cpx_nps4"}
    mixed = next(step for step in plan_steps(plan).steps if step.action == "await")
    assert (mixed.allocatable, mixed.await_labels) == ({"amd.com/cpx_nps4": 32}, {})


def test_an_sr_iov_guest_keeps_its_modes_and_the_plan_says_so():
    guest = emulate("MI300X", 1, "SPX/NPS1", "sr-iov", name="guest")
    (card,) = guest.cards
    device = card.partitions[0].model_copy(update={"memory_mib": 196_048, "memory_source": "measured"})
    card = card.model_copy(update={"pci_id": "0x74b5", "vram_mib": 196_048, "partitions": (device,)})
    guest = guest.model_copy(update={"cards": (card,)})
    plan = make_plan(fleet_of([guest]), work("{name: a, memory: 20GiB, replicas: 8}"))
    assert [(card.mode, card.was, card.device_memory_mib) for card in plan.cards] == [("SPX/NPS1", "SPX/NPS1", 196_048)]
    assert (plan.totals.nodes_drained, plan.totals.cards_switched, len(plan.placements)) == (0, 0, 1)
    assert any("guest" in note and "SR-IOV" in note for note in plan.notes)
    assert {step.action for step in plan_steps(plan).steps} == {"place"}
    # Made elsewhere, or before anyone said what the node is.
    foreign = make_plan(fleet_of(three_nodes("SPX/NPS1")), work("{name: a, memory: 20GiB, replicas: 32}"))
    cards = tuple(card.model_copy(update={"deployment": "sr-iov"}) for card in foreign.cards)
    with pytest.raises(PlanError, match="n0 is an SR-IOV guest"):
        plan_steps(foreign.model_copy(update={"cards": cards}))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("mode", "n0 card 2: mode should be CPX/NPS4, is SPX/NPS1"),
        ("card", "n0 card 3: card should be MI300X, is no such card"),
        ("memory", "n0 card 1: memory should be 24574 MiB, is 24000 MiB"),
        ("partitions", "n0 card 0: partitions should be 8 partitions, is 7 partitions"),
        ("product", "n0 card 0: product should be MI300X, is MI308X"),
        ("alloc", "n0 card 0: alloc-mode should be CAPPING, is ALL"),
    ],
)
def test_assert_names_what_differs(what: str, words: str):
    (node,) = three_nodes("CPX/NPS4")
    plan = make_plan(fleet_of([node]), work("{name: a, memory: 10GiB, replicas: 3}"))
    assert plan_assert(node, plan) == ()
    cards = list(node.cards)
    if what == "mode":
        cards[2] = switched(cards[2], "SPX/NPS1")
    elif what == "card":
        del cards[3]
    elif what == "memory":
        parts = cards[1].partitions
        cards[1] = cards[1].model_copy(
            update={"partitions": (parts[0].model_copy(update={"memory_mib": 24000}), *parts[1:])}
        )
    elif what == "partitions":
        cards[0] = cards[0].model_copy(update={"partitions": cards[0].partitions[:7]})
    elif what == "product":
        cards[0] = cards[0].model_copy(update={"product": "MI308X"})
    else:
        cards[0] = cards[0].model_copy(update={"alloc_mode": "ALL"})
    found = plan_assert(node.model_copy(update={"cards": tuple(cards)}), plan)
    assert words in [difference.message for difference in found]


def smaller(node: Node, card: int, partition: int, by_mib: int) -> Node:
    """The node with one device that reports less memory."""
    cards = list(node.cards)
    parts = list(cards[card].partitions)
    parts[partition] = parts[partition].model_copy(update={"memory_mib": (parts[partition].memory_mib or 0) - by_mib})
    cards[card] = cards[card].model_copy(update={"partitions": tuple(parts)})
    return node.model_copy(update={"cards": tuple(cards)})


@pytest.mark.parametrize("by_mib", [6, 16, 49])
def test_a_device_a_little_smaller_than_planned_is_as_planned_while_its_replica_fits(by_mib: int):
    (node,) = three_nodes("CPX/NPS4")
    plan = make_plan(fleet_of([node]), work("{name: a, memory: 10GiB, replicas: 32}"))
    assert plan_assert(smaller(node, 3, 7, by_mib), plan) == ()


def test_beyond_the_tolerance_it_is_not():
    (node,) = three_nodes("CPX/NPS4")
    plan = make_plan(fleet_of([node]), work("{name: a, memory: 10GiB, replicas: 32}"))
    (found,) = plan_assert(smaller(node, 3, 7, 50), plan)
    assert found.message == "n0 card 3: memory should be 24574 MiB, is 24524 MiB"


def test_what_no_longer_fits_a_smaller_device_is_named():
    (node,) = three_nodes("CPX/NPS4")
    # 0.9 of 24574 MiB is 22116.6 MiB: the last replica is within 2 MiB of it.
    plan = make_plan(fleet_of([node]), work("{name: a, memory: 22115MiB, replicas: 32}"))
    assert plan_assert(smaller(node, 3, 7, 1), plan) == ()
    (found,) = plan_assert(smaller(node, 3, 7, 6), plan)
    assert (found.card, found.what) == (3, "memory")
    assert "21.597 GiB for a/31 in partition 7" in found.planned
    assert found.found == "21.593 GiB of 24568 MiB"
    # Nobody stands on it: nothing has to fit.
    fewer = make_plan(fleet_of([node]), work("{name: a, memory: 22115MiB, replicas: 31}"))
    empty = next((card, part) for card in range(4) for part in range(8) if ("n0", card, part) not in fewer.by_device)
    assert plan_assert(smaller(node, *empty, 6), fewer) == ()


def test_those_who_share_a_smaller_device_must_fit_together():
    (node,) = three_nodes("CPX/NPS4")
    plan = make_plan(fleet_of([node]), work("{name: a, memory: 10GiB, memory_limit: 11057MiB, replicas: 2}"))
    assert {placement.devices for placement in plan.placements} == {((0, 0),)}
    assert plan_assert(smaller(node, 0, 0, 1), plan) == ()
    (found,) = plan_assert(smaller(node, 0, 0, 16), plan)
    assert "a/0 and a/1" in found.planned


def test_a_switch_that_ends_with_a_smaller_last_quadrant_is_carried_through():
    nodes = three_nodes("SPX/NPS1")
    plan = make_plan(fleet_of(nodes), work("{name: a, memory: 10GiB, replicas: 32}"))

    class Smaller(EmulatedNodes):
        def read(self, node: str) -> Node:
            return smaller(super().read(node), 0, 7, 16)

    executor = Smaller(nodes, plan)
    steps = plan_steps(plan)
    assert apply_steps(steps, plan, executor) == steps.steps
    assert len(executor.running) == 32


def test_assert_wants_a_node_of_the_plan():
    (node,) = three_nodes("CPX/NPS4")
    plan = make_plan(fleet_of([node]), work("{name: a, memory: 10GiB}"))
    assert plan_assert(node.model_copy(update={"name": None}), plan) == ()
    with pytest.raises(PlanError, match="no node 'elsewhere'"):
        plan_assert(node, plan, "elsewhere")


def test_max_parallel_bounds_the_nodes_drained_at_once():
    nodes = [emulate("MI300X", 2, "SPX/NPS1", name=f"n{at}") for at in range(5)]
    plan = make_plan(fleet_of(nodes), work("{name: a, memory: 10GiB, replicas: 80}"))
    assert plan.totals.nodes_drained == 5
    for most in (1, 2, 5):
        executor = EmulatedNodes(nodes, plan)
        apply_steps(plan_steps(plan, max_parallel=most), plan, executor)
        assert executor.most_drained == most
    with pytest.raises(AimProfileError, match="max_parallel"):
        plan_steps(plan, max_parallel=0)


def test_surge_starts_the_new_before_the_old_stops():
    nodes = three_nodes("CPX/NPS4", "CPX/NPS4")
    fleet = fleet_of(nodes)
    pin = "{name: a, memory: 10GiB, pinned: {node: %s}}"
    before, after = make_plan(fleet, work(pin % "n0")), make_plan(fleet, work(pin % "n1"))
    for surge, least in ((0, 0), (1, 1)):
        executor = EmulatedNodes(nodes, after, list(before.placements))
        steps = plan_steps(after, before, surge=surge)
        apply_steps(steps, after, executor)
        assert executor.least_running == least
        assert [step.action for step in steps.steps] == (["place", "stop"] if surge else ["stop", "place"])
        assert executor.running["a/0"].node == "n1"


@pytest.mark.parametrize("surge", [0, 3])
def test_many_moves_cost_what_their_number_does(surge: int, monkeypatch: pytest.MonkeyPatch):
    asked = 0
    look = Running.in_the_way

    def counted(self: Running, placement: Placement, *, itself: bool) -> object:
        nonlocal asked
        asked += 1
        return look(self, placement, itself=itself)

    monkeypatch.setattr(Running, "in_the_way", counted)
    nodes = [emulate("MI300X", 8, "CPX/NPS4", name=f"n{at}") for at in range(4)]
    entries = [f"{{name: {name}, memory: 10GiB, replicas: 64, pinned: {{node: %s}}}}" for name in "ab"]
    pin = ", ".join(entries)
    before, after = (make_plan(fleet_of(nodes), work(pin % pair)) for pair in (("n0", "n1"), ("n1", "n2")))
    assert before.complete
    assert after.complete
    executor = EmulatedNodes(nodes, after, list(before.placements))
    apply_steps(plan_steps(after, before, surge=surge), after, executor)
    assert executor.running == {placement.id: placement for placement in after.placements}
    assert asked <= 5 * len(after.placements)


def test_diff_names_modes_and_replicas():
    nodes = three_nodes("SPX/NPS1", "SPX/NPS1")
    fleet = fleet_of(nodes)
    before = make_plan(fleet, work("{name: a, memory: 10GiB, replicas: 2}"))
    after = make_plan(fleet, work("{name: a, memory: 20GiB}", "{name: b, memory: 10GiB, replicas: 20}"))
    assert plan_diff(before, before).empty
    changes = {(change.what, change.subject) for change in plan_diff(before, after).changes}
    assert ("stopped", "a/1") in changes
    assert ("placed", "b/19") in changes
    assert {what for what, _ in changes} >= {"mode", "placed", "stopped"}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["SPX/NPS1", "CPX/NPS4", "DPX/NPS2"]), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from(["10GiB", "30GiB", "100GiB"]), st.integers(1, 9), st.booleans()), max_size=4),
    st.lists(st.tuples(st.sampled_from(["10GiB", "30GiB", "100GiB"]), st.integers(1, 9), st.booleans()), max_size=4),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_any_plan_is_reached_from_any_other(modes: list[str], first, second, most: int, surge: int):  # noqa: ANN001
    nodes = [emulate("MI300X", 2, mode, name=f"n{at}") for at, mode in enumerate(modes)]

    def plan(asked: list[tuple[str, int, bool]], here: list[Node], before: Plan | tuple[()] = ()) -> Plan:
        entries = [
            f"{{name: w{at}, memory: {memory}, replicas: {count}, priority: {'high' if high else 'low'}}}"
            for at, (memory, count, high) in enumerate(asked)
        ]
        return make_plan(fleet_of(here), work(*entries), PlanOptions(effort=1500, allow_eviction=True), before)

    one = plan(first, nodes)
    executor = EmulatedNodes(nodes, one)
    apply_steps(plan_steps(one, max_parallel=most, surge=surge), one, executor)
    assert differences(executor, one) == []
    two = plan(second, list(executor.nodes.values()), one)
    executor = EmulatedNodes(list(executor.nodes.values()), two, list(one.placements))
    apply_steps(plan_steps(two, one, max_parallel=most, surge=surge), two, executor)
    assert differences(executor, two) == []
    assert {name: p.devices for name, p in executor.running.items()} == {p.id: p.devices for p in two.placements}
    assert executor.most_drained <= most


def limits(executor: EmulatedNodes) -> dict[tuple[str, int, int], float]:
    """GiB promised on each device that is shared now."""
    found: dict[tuple[str, int, int], float] = {}
    for placement in executor.running.values():
        for device in placement.devices:
            key = (placement.node, *device)
            found[key] = found.get(key, 0.0) + (placement.memory_limit_gib or 0.0)
    return found


class Watched(EmulatedNodes):
    """Remembers the most that was ever promised on one device."""

    most_promised_gib = 0.0

    def place(self, step: Step) -> None:
        super().place(step)
        self.most_promised_gib = max(self.most_promised_gib, *limits(self).values())


@pytest.mark.parametrize("surge", [0, 1, 3])
def test_sharers_never_take_more_of_a_device_than_it_has_on_the_way(surge: int):
    nodes = three_nodes("CPX/NPS4", "CPX/NPS4")
    sharer = "{name: %s, memory: 9GiB, memory_limit: 10GiB, pinned: {node: n%d, card: 0, partition: 0}}"
    before = make_plan(
        fleet_of(nodes), work(sharer % ("a", 0), sharer % ("b", 0), sharer % ("c", 1), sharer % ("d", 1))
    )
    after = make_plan(fleet_of(nodes), work(sharer % ("a", 1), sharer % ("b", 1), sharer % ("c", 0), sharer % ("d", 0)))
    assert before.complete
    assert after.complete
    executor = Watched(nodes, after, list(before.placements))
    apply_steps(plan_steps(after, before, surge=surge), after, executor)
    assert executor.running == {placement.id: placement for placement in after.placements}
    assert executor.most_promised_gib <= 21.6


@pytest.mark.parametrize("surge", [0, 1])
@pytest.mark.parametrize(
    ("then", "now", "why"),
    [
        ("memory_limit: 10GiB, priority: high", "memory_limit: 10GiB", "memory_limit_gib None → 10.0"),
        ("memory_limit: 10GiB", "memory_limit: 12GiB", "memory_limit_gib 10.0 → 12.0"),
        ("context: 4096", "context: 8192", "context 4096 → 8192"),
        ("slo: latency", "slo: throughput", "slo latency → throughput"),
    ],
)
def test_a_replica_that_changes_where_it_stands_starts_anew(then: str, now: str, why: str, surge: int):
    nodes = three_nodes("CPX/NPS4")
    here = "{name: a, memory: 9GiB, pinned: {node: n0, card: 0, partition: 0}, %s}"
    other = "{name: b, memory: 9GiB, memory_limit: 9GiB, pinned: {node: n0, card: 0, partition: 0}}"
    before = make_plan(fleet_of(nodes), work(here % then))
    after = make_plan(fleet_of(nodes), work(here % now, *([other] if "limit" in now else [])), current=before)
    assert after.complete
    steps = plan_steps(after, before, surge=surge)
    assert [step.text for step in steps.steps if step.action == "stop"] == [f"stop a/0: it starts anew: {why}"]
    executor = EmulatedNodes(nodes, after, list(before.placements))
    apply_steps(steps, after, executor)
    assert executor.running == {placement.id: placement for placement in after.placements}
    assert not plan_diff(before, after).empty


def test_a_replica_that_runs_on_is_left_alone():
    nodes = three_nodes("CPX/NPS4")
    plan = make_plan(fleet_of(nodes), work("{name: a, memory: 9GiB, memory_limit: 10GiB, replicas: 2}"))
    again = make_plan(fleet_of(nodes), work("{name: a, memory: 9GiB, memory_limit: 10GiB, replicas: 3}"), current=plan)
    assert [step.action for step in plan_steps(again, plan).steps] == ["place"]
