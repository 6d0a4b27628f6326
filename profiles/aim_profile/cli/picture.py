"""A plan drawn: which card is in which mode, who is on each device, and how much of it is left."""

from __future__ import annotations

from itertools import groupby

from aim_profile.nodes.facts import CPU
from aim_profile.plans.plan import CardPlan, Placement, Plan
from aim_profile.sizing.fit import DEFAULT_UTILIZATION

from .overview import overview
from .svg import CardBox, Device, NodeBox, Tenant, picture

_MIB_PER_GIB = 1024
# More are an overview: in full they would be a poster of which no screen shows a readable part.
MOST_DETAILED_CARDS = 128

# Who holds a device: by node, card and partition.
Held = dict[tuple[str, int, int], list[Tenant]]


def draw(plan: Plan, title: str = "Fleet plan") -> str:
    """The plan as SVG: every replica on every card, or for a large fleet an overview."""
    held: Held = {}
    for placement in plan.placements:
        for place, (card, partition) in enumerate(placement.devices, start=1):
            held.setdefault((placement.node, card, partition), []).append(_tenant(placement, place))
    nodes = [_node(name, list(cards), held) for name, cards in groupby(plan.cards, key=lambda card: card.node)]
    return (picture if len(plan.cards) <= MOST_DETAILED_CARDS else overview)(title, summary(plan), nodes)


def summary(plan: Plan) -> str:
    """The plan in one line of figures."""
    totals = plan.totals
    fallen = len({run.workload for run in plan.placements if run.fallback})
    asked, placed = (sum(counts.values()) for counts in (totals.asked, totals.placed))
    parts = [
        f"{placed} of {asked} replicas placed",
        f"{totals.cards_used} of {totals.cards} cards used",
        _count(totals.nodes_drained, "node drained", "nodes drained") if totals.nodes_drained else "",
        _count(totals.cards_switched, "card switched", "cards switched"),
        f"{totals.evicted} evicted" if totals.evicted else "",
        _count(fallen, "workload in a fallback", "workloads in a fallback") if fallen else "",
        "proven best" if totals.proven else "not proven best" if totals.method == "exact" else "",
        f"at most {max(1, round(totals.gap * 100))}% more cards than needed"
        if totals.gap and not totals.proven
        else "",
        "partition modes not all validated by AMD" if _daring(plan) else "",
        "tensor parallelism over partitions is unproven" if any(_spans(run) for run in plan.placements) else "",
        "memory estimated, not measured",
    ]
    return " · ".join(part for part in parts if part)


def _count(number: int, one: str, many: str) -> str:
    return f"no {one}" if not number else f"1 {one}" if number == 1 else f"{number} {many}"


def _spans(placement: Placement) -> bool:
    return placement.tp > 1 and len(placement.cards) == 1


def _daring(plan: Plan) -> bool:
    used = {(placement.node, card) for placement in plan.placements for card in placement.cards}
    return any(card.tier != "validated" and card.gpu != CPU for card in plan.cards if (card.node, card.card) in used)


def _node(name: str, cards: list[CardPlan], held: Held) -> NodeBox:
    note = f"{cards[0].gpu} · {cards[0].deployment}"
    return NodeBox(name, note, tuple(_card(card, held) for card in cards))


def _card(card: CardPlan, held: Held) -> CardBox:
    size_gib = card.device_memory_mib / _MIB_PER_GIB
    devices = tuple(
        Device(index, size_gib, tuple(held.get((card.node, card.card, index), ())), size_gib * DEFAULT_UTILIZATION)
        for index in range(card.partitions)
    )
    was = card.was if card.was != card.mode else None
    return CardBox(card.card, card.mode or "mode unknown", devices, was)


def _tenant(placement: Placement, place: int) -> Tenant:
    """The replica on the `place`-th of its devices."""
    name = placement.id if placement.tp == 1 else f"{placement.id} ({place} of {placement.tp})"
    asked = f"{placement.context} tokens x {placement.concurrency}" if placement.kind == "serve" else ""
    details = (
        placement.model or f"{placement.kind} job",
        ", ".join(part for part in (placement.precision or "", asked) if part),
        f"{placement.headroom_gib:.1f} GiB of headroom",
        f"in its fallback {placement.fallback}" if placement.fallback else "",
    )
    return Tenant(
        name,
        tuple(detail for detail in details if detail),
        placement.priority,
        placement.need_gib,
        placement.budget_gib,
        placement.memory_limit_gib,
    )
