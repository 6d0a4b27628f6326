"""Plans beside plans, and plans beside what is really there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from aim_profile.nodes.facts import Card, Node
from aim_profile.sizing.fit import budget_bytes
from aim_profile.units import MIB, gib

from .plan import CardPlan, Placement, Plan, PlanError, changes_at_start

# A device may report so much less than planned, if what stands there still fits: firmware keeps megabytes of a card
# for itself, not everywhere the same (the last partition of a card in NPS4 is 16 MiB smaller, some are 6 MiB smaller).
MEMORY_TOLERANCE = 0.002


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Difference(_Frozen):
    """One thing that is not as planned. card: its index, None: the node as a whole; message: for people."""

    node: str
    card: int | None = None
    what: Literal["cards", "card", "product", "mode", "partitions", "memory", "alloc-mode", "allocatable"]
    planned: str
    found: str
    message: str


class Change(_Frozen):
    """One difference between two plans. subject: `n0 card 3` or `chat/0`; before, after: empty where there is none.

    changed: its memory is as it was, what it is started with is not.
    """

    what: Literal["mode", "placed", "stopped", "moved", "resized", "changed", "card added", "card removed"]
    subject: str
    before: str = ""
    after: str = ""


class PlanDiff(_Frozen):
    """What changes from one plan to another: modes of cards by node, then replicas by name."""

    changes: tuple[Change, ...]

    @property
    def empty(self) -> bool:
        """Whether the plans put everything in the same place and mode."""
        return not self.changes


def plan_diff(old: Plan, new: Plan) -> PlanDiff:
    """What `new` changes: modes of cards, replicas that come, go, move, or need another amount of memory."""
    changes = [*_mode_changes(old.cards, new.cards), *_replica_changes(old.placements, new.placements)]
    return PlanDiff(changes=tuple(changes))


def _mode_changes(old: Iterable[CardPlan], new: Iterable[CardPlan]) -> Iterable[Change]:
    before = {(card.node, card.card): card for card in old}
    after = {(card.node, card.card): card for card in new}
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        subject = f"{key[0]} card {key[1]}"
        if was is None and now is not None:
            yield Change(what="card added", subject=subject, after=f"{now.gpu} {now.mode or 'unknown mode'}")
        elif now is None and was is not None:
            yield Change(what="card removed", subject=subject, before=f"{was.gpu} {was.mode or 'unknown mode'}")
        elif was is not None and now is not None and was.mode != now.mode:
            yield Change(what="mode", subject=subject, before=was.mode or "unknown", after=now.mode or "unknown")


def _replica_changes(old: Iterable[Placement], new: Iterable[Placement]) -> Iterable[Change]:
    before = {placement.id: placement for placement in old}
    after = {placement.id: placement for placement in new}
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was is None and now is not None:
            yield Change(what="placed", subject=name, after=where(now))
        elif now is None and was is not None:
            yield Change(what="stopped", subject=name, before=where(was))
        elif was is not None and now is not None and where(was) != where(now):
            yield Change(what="moved", subject=name, before=where(was), after=where(now))
        elif was is not None and now is not None and was.need_gib != now.need_gib:
            yield Change(what="resized", subject=name, before=f"{was.need_gib} GiB", after=f"{now.need_gib} GiB")
        elif was is not None and now is not None and (changed := changes_at_start(was, now)):
            yield Change(what="changed", subject=name, after=", ".join(changed))


def where(placement: Placement) -> str:
    """`n0 card 3 partitions 0-1 (CPX/NPS4)`."""
    cards = ",".join(map(str, placement.cards))
    partitions = ",".join(map(str, placement.partitions))
    which = f" partition {partitions}" if len(placement.cards) == 1 else ""
    return f"{placement.node} card {cards}{which} ({placement.mode})"


def plan_assert(
    node: Node, plan: Plan, name: str | None = None, planned: Sequence[CardPlan] | None = None
) -> tuple[Difference, ...]:
    """What on this node is not as planned; empty when all is.

    name: the node's name in the plan, else the node's own, else the plan's only one. Cards whose mode the plan does
    not say are not compared. Modes and counts must be equal; devices may be MEMORY_TOLERANCE smaller than planned
    (CPU sets by any amount) where what the plan puts there fits their real size. planned: the plan's cards of the node
    of that name, where they are at hand already. Raises PlanError when the plan has no such node.
    """
    named = name if planned is not None and name is not None else name_in_plan(node, plan, name)
    found = {card.index: card for card in node.cards}
    differences = []
    planned = plan.on_node(named) if planned is None else planned
    if len(planned) != len(found):
        differences.append(_difference(named, None, "cards", f"{len(planned)} cards", f"{len(found)} cards"))
    for expected in planned:
        card = found.get(expected.card)
        if card is None:
            differences.append(_difference(named, expected.card, "card", expected.gpu, "no such card"))
        else:
            differences += _card_differences(named, expected, card, plan)
    return tuple(differences)


def allocatable_difference(node: str, planned: Mapping[str, int], found: Mapping[str, int]) -> tuple[Difference, ...]:
    """What a node advertises beside what it should; resources of which there are none do not count."""
    there = {name: count for name, count in found.items() if count}
    if there == planned:
        return ()
    texts = [", ".join(f"{name}: {count}" for name, count in sorted(each.items())) for each in (planned, there)]
    return (_difference(node, None, "allocatable", texts[0], texts[1] or "nothing"),)


def name_in_plan(node: Node, plan: Plan, name: str | None) -> str:
    """What the plan calls the node: `name`, else its own, else the plan's only one. Raises PlanError without one."""
    names = {card.node for card in plan.cards}
    wanted = name or node.name
    if wanted is None and len(names) == 1:
        return next(iter(names))
    if wanted not in names:
        some = ", ".join(sorted(names)[:5])
        raise PlanError(
            f"the plan has no node {wanted!r}" if wanted else "the node has no name",
            field="node",
            value=wanted,
            remedy=f"name one of the plan's: {some}",
        )
    return wanted


def _card_differences(node: str, planned: CardPlan, card: Card, plan: Plan) -> list[Difference]:
    if card.product != planned.gpu:
        return [_difference(node, card.index, "product", planned.gpu, card.product)]
    if planned.mode is None:
        return []
    mode = card.planned_as
    if mode != planned.mode:
        return [_difference(node, card.index, "mode", planned.mode, mode or card.mode_text)]
    found = []
    if len(card.partitions) != planned.partitions:
        text = f"{len(card.partitions)} partitions"
        found.append(_difference(node, card.index, "partitions", f"{planned.partitions} partitions", text))
    found += _memory_differences(node, planned, card, plan)
    if card.alloc_mode == "ALL" and planned.partitions > 1:
        found.append(_difference(node, card.index, "alloc-mode", "CAPPING", "ALL"))
    return found


def _memory_differences(node: str, planned: CardPlan, card: Card, plan: Plan) -> list[Difference]:
    known = [(part.memory_mib, part) for part in card.partitions if part.memory_mib is not None]
    smaller = [(mib, part) for mib, part in known if mib < planned.device_memory_mib]
    smallest = min((mib for mib, _ in smaller), default=planned.device_memory_mib)
    # What is free on a machine without a GPU changes every second: there only what stands on it counts.
    if not card.is_cpu and smallest < planned.device_memory_mib * (1 - MEMORY_TOLERANCE):
        return [_difference(node, card.index, "memory", f"{planned.device_memory_mib} MiB", f"{smallest} MiB")]
    found = []
    for mib, part in smaller:
        here = plan.by_device.get((node, card.index, part.index), ())
        need = sum(placement.memory_limit_gib or placement.need_gib for placement in here)
        if need > (budget := gib(budget_bytes(mib * MIB))):
            names = " and ".join(placement.id for placement in here)
            wanted = f"{need:.3f} GiB for {names} in partition {part.index}"
            found.append(_difference(node, card.index, "memory", wanted, f"{budget} GiB of {mib} MiB"))
    return found


def _difference(node: str, card: int | None, what: str, planned: str, found: str) -> Difference:
    place = node if card is None else f"{node} card {card}"
    return Difference.model_validate(
        {
            "node": node,
            "card": card,
            "what": what,
            "planned": planned,
            "found": found,
            "message": f"{place}: {what} should be {planned}, is {found}",
        }
    )
