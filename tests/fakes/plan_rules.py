"""Random fleets and workloads, and every rule a plan must keep, found without the planner's own code."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from aim_profile.gpus.catalog import TIERS, by_name
from aim_profile.models.known import by_id
from aim_profile.plans.fleet import Fleet, parse_fleet
from aim_profile.plans.plan import Placement, Plan, PlanOptions
from aim_profile.plans.workload import Workload, Workloads
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
