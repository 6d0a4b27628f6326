"""What each node of a plan is to become, in the Device Config Manager's words; or why it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from aim_profile.errors import AimProfileError
from aim_profile.gpus.catalog import TIERS, Tier, by_name
from aim_profile.kubernetes.plan_objects import refuse_shared
from aim_profile.plans import dcm
from aim_profile.plans.plan import CardPlan, Plan, PlanError, cards_by_node

#: What the Device Config Manager knows (globals/constants.go, 02eb8dd); it checks the words, never the combination.
_KNOWN_COMPUTE = ("SPX", "DPX", "QPX", "CPX")


class Target(NamedTuple):
    """One node. modes: of each card, in card order; devices: partitions of each card."""

    node: str
    modes: tuple[str, ...]
    devices: tuple[int, ...]
    strategy: dcm.Strategy

    @property
    def profile(self) -> str:
        """The Device Config Manager's profile."""
        return dcm.profile_name(self.modes)

    @property
    def allocatable(self) -> Mapping[str, int]:
        """What the node advertises once it is there, by resource name."""
        return dcm.allocatable(zip(self.modes, self.devices, strict=True), self.strategy)

    @property
    def label(self) -> str | None:
        """The node labeller's `compute-memory-partition`; None where the cards are in several modes."""
        return dcm.mode_label(self.modes[0]) if len(set(self.modes)) == 1 else None

    @property
    def text(self) -> str:
        """`CPX/NPS4`, or several: `CPX/NPS1+DPX/NPS1`."""
        return "+".join(dict.fromkeys(self.modes))


def targets(plan: Plan, strategy: dcm.Strategy) -> tuple[Target, ...]:
    """The nodes whose cards can be partitioned, those on which nothing runs first.

    Raises PlanError for a mode that the card, its deployment, the Device Config Manager or the device plugin refuses,
    RenderError where a service shares a device.
    """
    refuse_shared(plan)
    busy = {placement.node for placement in plan.placements if placement.running}
    grouped = cards_by_node(card for card in plan.cards if _partitionable(card))
    ordered = sorted(grouped, key=lambda node: (node in busy, node))
    return tuple(_target(node, grouped[node], plan.tier, strategy) for node in ordered)


def _partitionable(card: CardPlan) -> bool:
    return card.gpu != "cpu" and by_name(card.gpu).partitionable


def _target(node: str, cards: Sequence[CardPlan], tier: Tier, strategy: dcm.Strategy) -> Target:
    cards = sorted(cards, key=lambda card: card.card)
    modes = tuple(_checked(card, tier) for card in cards)
    dcm.refuse_mixed(node, modes, strategy)
    if len(memory := sorted({mode.partition("/")[2] for mode in modes})) > 1:
        raise _refused(cards[0], " and ".join(memory), "a node has one memory mode")
    return Target(node, modes, tuple(card.partitions for card in cards), strategy)


def _checked(card: CardPlan, tier: Tier) -> str:
    if card.mode is None:
        raise _refused(card, None, "the Device Config Manager is told of every card of a node")
    if card.deployment == "sr-iov":
        raise _refused(card, card.mode, "an SR-IOV guest's host decides its modes")
    try:
        mode = by_name(card.gpu).mode(card.mode, "bare-metal" if card.deployment == "unknown" else card.deployment)
    except AimProfileError as problem:
        raise _refused(card, card.mode, problem.problem) from problem
    if TIERS.index(mode.tier) > TIERS.index(tier):
        raise _refused(card, card.mode, f"{card.gpu} in it is {mode.tier}, and the plan asks for {tier}")
    if mode.compute not in _KNOWN_COMPUTE:
        raise _refused(card, card.mode, f"the Device Config Manager knows {', '.join(_KNOWN_COMPUTE)} only")
    if mode.partitions != card.partitions:
        raise _refused(card, card.mode, f"it makes {mode.partitions} devices, the plan says {card.partitions}")
    return card.mode


def _refused(card: CardPlan, value: str | None, why: str) -> PlanError:
    where = f"spec.plan.cards: {card.node} card {card.card}"
    return PlanError(
        f"{where}: mode {value}: {why}",
        field="spec.plan.cards",
        value=card.node,
        remedy="plan again with `aim-profile plan`, which gives only what a node can be, and apply that",
    )
