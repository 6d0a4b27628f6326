"""The verbs that compare plans with plans and with nodes: diff, assert, steps. Each returns the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from aim_profile.files.kinds import looks_like
from aim_profile.files.read import read_parsed
from aim_profile.gpus.catalog import Deployment
from aim_profile.nodes.read import Node
from aim_profile.plans.compare import plan_assert, plan_diff
from aim_profile.plans.dcm import Strategy
from aim_profile.plans.fleet import Fleet, fleet_from
from aim_profile.plans.plan import CardPlan, Plan, PlanError, load_plan, plan_of
from aim_profile.plans.steps import Step, Steps, plan_steps

from .output import DOES_NOT_FIT, FITS, Facts, Output, Table, print_note, show


class _Now(NamedTuple):
    """What a card is now. mode None: not known."""

    gpu: str
    deployment: Deployment | Literal["unknown"]
    mode: str | None


Cards = dict[tuple[str, int], _Now]


def diff(output: Output, old: Path, new: Path) -> int:
    """What the new plan changes. Exit 1 where it changes anything."""
    found = plan_diff(load_plan(old), load_plan(new))
    rows = [(change.what, change.subject, change.before or "-", change.after or "-") for change in found.changes]
    data = {"equal": found.empty, "changes": [change.model_dump() for change in found.changes]}
    show(output, data, Table(("what", "subject", "before", "after"), rows) if rows else "No difference.")
    return FITS if found.empty else DOES_NOT_FIT


def assert_plan(output: Output, plan: Path, node: Node, name: str | None) -> int:
    """What on the node is not as planned. Exit 1 where anything is not."""
    planned = load_plan(plan)
    found = plan_assert(node, planned, name)
    rows = [(item.node, _card(item.card), item.what, item.planned, item.found) for item in found]
    columns = ("node", "card", "what", "planned", "found")
    same = f"{name or node.name or 'The node'} is as planned: {len(node.cards)} cards, {node.devices} devices."
    data = {"equal": not found, "differences": [item.model_dump() for item in found]}
    show(output, data, Table(columns, rows) if rows else same)
    return DOES_NOT_FIT if found else FITS


def _card(number: int | None) -> str:
    return "-" if number is None else str(number)


def steps(output: Output, current: Path, plan: Path, max_parallel: int, surge: int, strategy: Strategy) -> int:
    """The way from what runs to the plan. current: a plan; or a fleet or emulated node, on which nothing runs."""
    planned = load_plan(plan)
    now = read_parsed(current, PlanError)
    running = plan_of(now) if looks_like(now.raw) == "plan" else None
    cards = _cards_of(running) if running else _cards_found(fleet_from(now, current.parent))
    seen = _seen_from(planned, cards, str(current))
    found = plan_steps(seen, running, max_parallel=max_parallel, surge=surge, strategy=strategy)
    show(output, found.model_dump(mode="json"), _facts(found), _table(found), _config_map(found))
    return FITS


def _cards_of(plan: Plan) -> Cards:
    return {(card.node, card.card): _Now(card.gpu, card.deployment, card.mode) for card in plan.cards}


def _cards_found(fleet: Fleet) -> Cards:
    return {
        (node.name, card.index): _Now(node.gpu, node.deployment, card.current)
        for node in fleet.nodes
        for card in node.cards
    }


def _seen_from(plan: Plan, now: Cards, named: str) -> Plan:
    """The plan with what its cards are now, which may not be what they were when it was made.

    A node that is not there at all (a plan for more nodes than one file says) is taken as the plan found it, and named.
    Raises PlanError where none is there, or where a node's cards are other ones.
    """
    nodes = {node for node, _ in now}
    absent = sorted({card.node for card in plan.cards} - nodes)
    if plan.cards and absent and not any(card.node in nodes for card in plan.cards):
        raise PlanError(
            f"{named}: none of the plan's nodes is there, {absent[0]} first",
            field="current",
            value=named,
            remedy="give what the plan was made for: its fleet, or a plan of the same nodes",
        )
    if absent:
        print_note(f"not in {named}, taken as the plan found them: {', '.join(absent[:5])}{', …' * (len(absent) > 5)}")
    return plan.model_copy(update={"cards": tuple(_card_now(card, now, nodes, named) for card in plan.cards)})


def _card_now(card: CardPlan, now: Cards, nodes: set[str], named: str) -> CardPlan:
    if card.node not in nodes:
        return card
    found = now.get((card.node, card.card))
    if found is None or found.gpu != card.gpu:
        there = "is not there" if found is None else f"is an {found.gpu}"
        raise PlanError(
            f"{named}: {card.node} card {card.card} {there}, the plan is for an {card.gpu}",
            field="current",
            value=card.node,
            remedy="plan again for the fleet as it is",
        )
    deployment = card.deployment if found.deployment == "unknown" else found.deployment
    return card.model_copy(update={"was": found.mode, "deployment": deployment})


def _facts(found: Steps) -> Facts:
    drained = {step.node for step in found.steps if step.action == "drain"}
    return Facts(
        (
            ("steps", str(len(found.steps))),
            ("nodes drained", f"{len(drained)}, at most {found.max_parallel} at once" if drained else "none"),
        )
    )


def _table(found: Steps) -> Table | str:
    rows = [_row(step) for step in found.steps]
    return Table(("step", "wave", "do", "node", "what"), rows, right=("step", "wave")) if rows else "Nothing to do."


def _row(step: Step) -> tuple[str, ...]:
    return (str(step.number), str(step.wave), step.action, step.node, step.text)


def _config_map(found: Steps) -> str:
    if not any(step.action == "switch" for step in found.steps):
        return ""
    return "Apply first: the Device Config Manager's ConfigMap (`aim-profile render PLAN` writes it)."
