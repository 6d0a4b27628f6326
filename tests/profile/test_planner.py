"""The planner: its rules hold for any fleet, its priorities and its order-independence too; and it explains itself."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aim_profile.gpus.catalog import TIERS, by_name
from aim_profile.models.known import by_id
from aim_profile.plans.fleet import Fleet, parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Placement, Plan, PlanOptions
from aim_profile.plans.workload import Workload, Workloads, parse_workloads, workloads_of
from aim_profile.sizing.fit import Request, budget_bytes, demand
from aim_profile.units import GIB, MIB, parse_memory

QUICK = 1500
LEVEL = {
    ("high", True): 0,
    ("high", False): 1,
    ("medium", True): 2,
    ("medium", False): 3,
    ("low", True): 4,
    ("low", False): 5,
}
MODELS = [
    ("Qwen/Qwen3-4B", "bf16"),
    ("meta-llama/Llama-3.1-8B-Instruct", "fp8"),
    ("Qwen/Qwen3-32B", "bf16"),
    ("meta-llama/Llama-3.3-70B-Instruct", "bf16"),
]


Nodes = list[dict[str, object]]


def fleet_yaml(nodes: Nodes) -> Fleet:
    return parse_fleet(json.dumps({"version": 1, "nodes": nodes}))


@st.composite
def fleets(draw: st.DrawFn) -> Nodes:
    found = []
    for number in range(draw(st.integers(1, 3))):
        gpu, modes = draw(
            st.sampled_from(
                [("MI300X", "SPX DPX CPX"), ("MI355X", "SPX QPX CPX"), ("MI308X", "SPX CPX"), ("MI210", "SPX")]
            )
        )
        found.append(
            {
                "name": f"n{number}",
                "gpu": gpu,
                "cards": draw(st.sampled_from([1, 2, 4])),
                "compute_partition": draw(st.sampled_from(modes.split())),
                "labels": {"zone": draw(st.sampled_from("ab"))},
            }
        )
    return found


@st.composite
def jobs(draw: st.DrawFn) -> list[Workload]:
    found: list[Workload] = []
    for number in range(draw(st.integers(1, 6))):
        model, precision = draw(st.sampled_from(MODELS))
        asked: dict[str, object] = {
            "model": model,
            "precision": precision,
            "context": draw(st.sampled_from([2048, 16384])),
        }
        shape = draw(st.sampled_from(["serve", "serve", "serve", "guardrail", "shared", "finetune"]))
        if shape == "shared":
            asked = {"memory": "5GiB", "memory_limit": "8GiB", "kind": "guardrail"}
        elif shape == "finetune":
            asked = {"memory": "60GiB", "kind": "finetune"}
        elif shape == "guardrail":
            asked["kind"] = "guardrail"
        others = [w.name for w in found]
        relation = draw(st.sampled_from(["", "", "affinity", "anti_affinity"])) if others else ""
        if relation:
            asked[relation] = (draw(st.sampled_from(others)),)
        if draw(st.integers(0, 5)) == 0:
            asked["pinned"] = {"node": "n0", "card": 0}
        if draw(st.integers(0, 5)) == 0:
            asked["node_selector"] = {"zone": draw(st.sampled_from("ab"))}
        asked["spread"] = draw(st.sampled_from([None, None, "node", "card"]))
        asked["slo"] = draw(st.sampled_from(["throughput", "latency"]))
        asked["replicas"] = draw(st.sampled_from([1, 2, 5]))
        asked["priority"] = draw(st.sampled_from(["low", "medium", "high"]))
        found.append(Workload.model_validate({"name": f"w{number}", **asked}))
    return found


OPTIONS = st.builds(
    PlanOptions,
    effort=st.just(QUICK),
    tier=st.sampled_from(["validated", "driver-legal"]),
    allow_mixed_compute=st.booleans(),
)


def broken_rules(fleet: Fleet, workloads: Workloads, plan: Plan, options: PlanOptions) -> list[str]:
    """Every rule a plan breaks, found without the planner's own code."""
    return [
        *_over_commits(plan),
        *_wrong_modes(fleet, plan, options),
        *_wrong_devices(plan, options),
        *_wrong_sizes(workloads, plan),
        *_wrong_relations(fleet, workloads, plan),
        *_lost_replicas(workloads, plan),
        *_wrong_totals(plan),
    ]


def _over_commits(plan: Plan) -> list[str]:
    holders: dict[tuple[str, int, int], list[Placement]] = defaultdict(list)
    for placement in plan.placements:
        for card, partition in placement.devices:
            holders[placement.node, card, partition].append(placement)
    memory = {(card.node, card.card): card.device_memory_mib for card in plan.cards}
    found = []
    for (node, card, _), here in holders.items():
        if len(here) > 1:
            limits = [placement.memory_limit_gib for placement in here]
            if None in limits or any(placement.priority == "high" for placement in here):
                found.append(f"{[p.id for p in here]} on one device")
            elif sum(limit or 0 for limit in limits) * GIB > budget_bytes(memory[node, card] * MIB) + MIB:
                found.append(f"{[p.id for p in here]} are promised more than there is")
    return found


def _wrong_modes(fleet: Fleet, plan: Plan, options: PlanOptions) -> list[str]:
    found = []
    for node in fleet.nodes:
        here = [placement for placement in plan.placements if placement.node == node.name]
        modes = {card.mode or "" for card in plan.on_node(node.name)}
        if here and len({mode.split("/")[1] for mode in modes}) > 1:
            found.append(f"{node.name}: memory modes {modes}")
        if here and not options.allow_mixed_compute and len(modes) > 1:
            found.append(f"{node.name}: compute modes {modes}")
        if not here and any(card.mode != card.was for card in plan.on_node(node.name)):
            found.append(f"{node.name}: switched for nobody")
    return found


def _wrong_devices(plan: Plan, options: PlanOptions) -> list[str]:
    found = []
    cards = {(card.node, card.card): card for card in plan.cards}
    for placement in plan.placements:
        for number, partition in placement.devices:
            card = cards[placement.node, number]
            mode = by_name(card.gpu).mode(card.mode or "")
            if card.mode != placement.mode or partition >= mode.partitions:
                found.append(f"{placement.id}: partition {partition} of a card in {card.mode}")
            if TIERS.index(mode.tier) > TIERS.index(options.tier):
                found.append(f"{placement.id}: {card.gpu} {mode.label} is {mode.tier}")
            if placement.tp > 1 and mode.partitions > 1 and len(placement.cards) > 1:
                found.append(f"{placement.id}: tensor parallel over partitions of several cards")
        if len(set(placement.devices)) != placement.tp:
            found.append(f"{placement.id}: {placement.devices} for tp {placement.tp}")
    return found


def _wrong_sizes(workloads: Workloads, plan: Plan) -> list[str]:
    asked = {workload.name: workload for workload in workloads.workloads}
    memory = {(card.node, card.card): card.device_memory_mib * MIB for card in plan.cards}
    found = []
    for placement in plan.placements:
        workload = asked[placement.workload]
        if workload.memory:
            need = parse_memory(workload.memory)
        else:
            request = Request(
                precision=workload.precision,
                context=workload.context,
                concurrency=workload.concurrency,
                tp=placement.tp,
            )
            need = demand(by_id(workload.model or ""), request).total
        if need > budget_bytes(memory[placement.node, placement.cards[0]]) or placement.headroom_gib < 0:
            found.append(f"{placement.id}: needs {need / GIB:.1f} GiB")
        if workload.slo == "latency" and placement.tp > 1 and len(placement.cards) == 1:
            found.append(f"{placement.id}: latency over sibling partitions")
    return found


def _wrong_relations(fleet: Fleet, workloads: Workloads, plan: Plan) -> list[str]:
    nodes: dict[str, list[str]] = defaultdict(list)
    cards: dict[str, list[tuple[str, int]]] = defaultdict(list)
    labels = {node.name: dict(node.labels) for node in fleet.nodes}
    for placement in plan.placements:
        nodes[placement.workload].append(placement.node)
        cards[placement.workload] += [(placement.node, card) for card in placement.cards]
    found = []
    for workload in workloads.workloads:
        here, name = nodes[workload.name], workload.name
        if workload.spread == "node" and len(set(here)) != len(here):
            found.append(f"{name}: two replicas on a node")
        if workload.spread == "card" and len(set(cards[name])) != len(cards[name]):
            found.append(f"{name}: two replicas on a card")
        found += [f"{name} without {other}" for other in workload.affinity if not set(here) <= set(nodes[other])]
        found += [f"{name} beside {other}" for other in workload.anti_affinity if set(here) & set(nodes[other])]
        if any(labels[node].get(key) != value for node in here for key, value in workload.node_selector.items()):
            found.append(f"{name}: not where its selector says")
        if workload.pinned and set(cards[name]) - {(workload.pinned.node, workload.pinned.card)}:
            found.append(f"{name}: not where it is pinned")
    return found


def _lost_replicas(workloads: Workloads, plan: Plan) -> list[str]:
    seen = Counter(placement.id for placement in plan.placements)
    seen.update(f"{left.workload}/{number}" for left in plan.unplaced for number in left.replicas)
    asked = Counter(f"{w.name}/{number}" for w in workloads.workloads for number in range(w.replicas))
    return [] if seen == asked else [f"replicas {seen} for {asked}"]


def _compute(mode: str | None) -> str | None:
    return mode and mode.partition("/")[0]


def _wrong_totals(plan: Plan) -> list[str]:
    totals, found = plan.totals, []
    used = {(p.node, card) for p in plan.placements for card in p.cards}
    drained = {card.node for card in plan.cards if card.changes_memory}
    switched = sum(_compute(card.mode) != _compute(card.was) for card in plan.cards)
    if (totals.cards_used, totals.nodes_drained, totals.cards_switched) != (len(used), len(drained), switched):
        found.append(f"totals {totals} for {len(used)} cards, {len(drained)} drained, {switched} switched")
    if totals.bound > totals.cards_used or totals.gap < 0:
        found.append(f"a bound of {totals.bound} for {totals.cards_used} cards")
    return found


def spanning(fleet: Fleet, workloads: Workloads, plan: Plan, options: PlanOptions) -> list[str]:
    """Replicas over several partitions of a card that nobody asked for, though a device that holds one is free."""
    asked = {workload.name: workload for workload in workloads.workloads}
    targets = {name for workload in workloads.workloads for name in workload.affinity}
    nodes = {node.name: node for node in fleet.nodes}
    used = {(p.node, card, part) for p in plan.placements for card, part in p.devices}
    usable = [card for card in plan.cards if card.mode and TIERS.index(card.tier) <= TIERS.index(options.tier)]
    free = [card for card in usable for part in range(card.partitions) if (card.node, card.card, part) not in used]
    found = []
    for placement in plan.placements:
        workload = asked[placement.workload]
        bound = workload.pinned or workload.spread or workload.affinity or workload.anti_affinity
        against = any(workload.name in other.anti_affinity for other in workloads.workloads)
        if placement.tp == 1 or len(placement.cards) > 1 or bound or against or workload.name in targets:
            continue
        for card in free:
            selected = set(workload.node_selector.items()) <= set(nodes[card.node].labels)
            if selected and _holds(workload, card.gpu, card.device_memory_mib * MIB):
                found.append(f"{placement.id} over {placement.tp} partitions, though {card.node} has a device free")
    return found


def passed_over(fleet: Fleet, workloads: Workloads, plan: Plan) -> list[str]:
    """Replicas that matter more than one placed on a device that would have held them."""
    asked = {workload.name: workload for workload in workloads.workloads}
    targets = {name for workload in workloads.workloads for name in workload.affinity}
    gpus = {node.name: node for node in fleet.nodes}
    found = []
    for left in plan.unplaced:
        workload = asked[left.workload]
        if workload.spread or workload.affinity or workload.anti_affinity or workload.pinned or workload.shares:
            continue
        if any(workload.name in other.anti_affinity for other in workloads.workloads):
            continue
        for placement in plan.placements:
            if (
                placement.workload in targets
                or LEVEL[placement.priority, placement.kind == "serve"] <= LEVEL[left.priority, left.kind == "serve"]
            ):
                continue
            node = gpus[placement.node]
            alone = _only_holder(placement, plan)
            selected = set(workload.node_selector.items()) <= set(node.labels)
            if alone and selected and _would_hold(workload, placement, node.gpu):
                found.append(f"{left.workload} ({left.priority}) passed over for {placement.id} ({placement.priority})")
    return found


def _only_holder(placement: Placement, plan: Plan) -> bool:
    same = [p for p in plan.placements if p.node == placement.node and set(p.devices) & set(placement.devices)]
    return len(same) == 1


def _would_hold(workload: Workload, placement: Placement, gpu: str) -> bool:
    return _holds(workload, gpu, by_name(gpu).mode(placement.mode).memory_bytes)


def _holds(workload: Workload, gpu: str, device_bytes: int) -> bool:
    if workload.model and workload.precision == "fp8" and gpu == "MI210":
        return False
    if workload.memory:
        return parse_memory(workload.memory) <= budget_bytes(device_bytes)
    request = Request(precision=workload.precision, context=workload.context, concurrency=workload.concurrency)
    return demand(by_id(workload.model or ""), request).total <= budget_bytes(device_bytes)


SLOW = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


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
