"""Plan again: one workload, node or card more or less changes as little as possible, and costs little.

What a plan placed and is still asked for stays where it is, in the modes that were planned; what is new, or has lost
its place, gets a free device (a local repair). Only where that leaves over what had a place, or is new, the whole
planner looks, and the answer says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import NamedTuple

from aim_profile.plans.search.bound import cards_bound
from aim_profile.plans.search.build import Builder, Strategy
from aim_profile.plans.search.fallbacks import fall_back
from aim_profile.plans.search.intake import make_problem
from aim_profile.plans.search.problem import with_avoided
from aim_profile.plans.search.state import State
from aim_profile.serving.evidence import Measurement

from .compare import where
from .fleet import Fleet
from .make import Writer, make_plan, without_loads
from .plan import PRIORITIES, CardPlan, Placement, Plan, PlanError, PlanOptions, Totals, changes_at_start
from .refusal import explain
from .running import same_place
from .settled import Settled, in_the_modes_of
from .workload import Priority, Workloads

_RUNS = "it runs here now"


class Replanned(NamedTuple):
    """The plan, and how it differs from the one before, by replica (`chat/0`): moved with the reason and both places;
    changed: they start anew where they stand. local: whether a local repair was enough; why: one line, what was done
    and why nothing else changes.
    """

    plan: Plan
    stays: int
    started: tuple[str, ...]
    stopped: tuple[str, ...]
    moved: Mapping[str, str]
    changed: Mapping[str, str]
    local: bool
    why: str


def replan(
    fleet: Fleet,
    workloads: Workloads,
    previous: Plan,
    options: PlanOptions | None = None,
    measurements: Sequence[Measurement] = (),
) -> Replanned:
    """The plan for what is asked and there now, that changes as little of `previous` as it can.

    `previous` is taken as carried out: its cards are in the modes it planned. Nothing that is still asked for moves or
    stops, unless options.allow_eviction lets those that may be evicted make way, or its place is gone: then it is said.
    Raises WorkloadError as make_plan does, PlanError where `previous` is of other nodes altogether.
    """
    options = options or PlanOptions()
    _refuse_others(fleet, previous)
    now = in_the_modes_of(fleet, previous)
    workloads, derived = without_loads(now, workloads, options, measurements)
    found = _replanned(now, workloads, previous, options)
    return found._replace(plan=found.plan.model_copy(update={"derived": derived})) if derived else found


def _refuse_others(fleet: Fleet, previous: Plan) -> None:
    here = {node.name for node in fleet.nodes}
    if previous.cards and not any(card.node in here for card in previous.cards):
        raise PlanError(
            f"the previous plan is of other nodes: the fleet has no {previous.cards[0].node}",
            field="previous",
            value=previous.cards[0].node,
            remedy="give the plan that was made for this fleet, or leave --previous out",
        )


def _replanned(now: Fleet, workloads: Workloads, previous: Plan, options: PlanOptions) -> Replanned:
    settled = Settled(now, workloads, previous, options)
    plan, final = _repaired(now, workloads, previous, options, settled)
    new = _newly_without(plan, previous)
    if not new:
        return _compared(plan, previous, now, settled, why="everything else has its place as before")
    why = f"a local repair left {_some(new)} without a device"
    if final:
        why += ", and without moving what runs nothing else can be tried"
    else:
        whole = make_plan(now, workloads, options, previous)
        better = _placed(whole) > _placed(plan)
        why += f", so the whole planner looked: it {'placed more' if better else 'found no better'}"
        if better:
            why += _from_scratch(now, workloads, options, whole)
            return _compared(whole, previous, now, None, why=why)
    return _compared(plan, previous, now, settled, why=why + _from_scratch(now, workloads, options, plan))


def _from_scratch(fleet: Fleet, workloads: Workloads, options: PlanOptions, plan: Plan) -> str:
    """What a plan that moves whatever it likes would place more of high and medium priority; empty where none would."""
    if all(plan.totals.placed[priority] == plan.totals.asked[priority] for priority in ("high", "medium")):
        return ""
    fresh = make_plan(fleet, workloads, options).totals.placed
    more = {name: fresh[name] - plan.totals.placed[name] for name in PRIORITIES[:2]}
    said = ", ".join(f"{number} more {name}" for name, number in more.items() if number > 0)
    if _level(fresh) <= _level(plan.totals.placed) or not said:
        return "; nor would a plan from scratch place more of high or medium priority"
    evict = "" if options.allow_eviction else "let low priority make way (--allow-eviction), or "
    return f"; a plan from scratch would place {said}: {evict}plan without the previous plan and move what runs"


def _level(placed: Mapping[Priority, int]) -> tuple[int, ...]:
    return tuple(placed[name] for name in PRIORITIES[:2])


def _placed(plan: Plan) -> tuple[int, ...]:
    counts = Counter((run.priority, run.kind == "serve") for run in plan.placements)
    return tuple(counts[priority, serves] for priority in PRIORITIES for serves in (True, False))


def _newly_without(plan: Plan, previous: Plan) -> list[str]:
    """Replicas without a device that had one, or were not asked for, before; too large ones do not count."""
    known = {f"{left.workload}/{number}" for left in previous.unplaced for number in left.replicas}
    return [
        name
        for left in plan.unplaced
        if left.cause != "too-large"
        for number in left.replicas
        if (name := f"{left.workload}/{number}") not in known
    ]


# --- the local repair -----------------------------------------------------------------------------------------------


def _repaired(
    fleet: Fleet, workloads: Workloads, previous: Plan, options: PlanOptions, settled: Settled
) -> tuple[Plan, bool]:
    """What `previous` placed stays; the rest gets what is free, empty nodes are switched for it where that helps.

    With whether that is all there is to try: nothing may move, no node is empty, and nothing that was placed just now
    could have been placed elsewhere.
    """
    current = tuple(run for run in previous.placements if run.workload not in settled.placements)
    held = options.model_copy(update={"allow_eviction": False})
    problem = make_problem(settled.nodes, settled.workloads, held, current)
    problem = replace(problem, occupied=settled.occupied(problem.nodes))
    state = Builder(problem, Strategy(), {}, may_switch=True).build()
    if over := [job for job in problem.jobs if job.avoided and state.count[job.index] < job.workload.replicas]:
        state.problem = with_avoided(problem)
    state = fall_back(state, again=bool(over))
    writer = Writer(settled.nodes, state.problem, state, held, current)
    others = writer.placements()
    short = any(state.count[job.index] < job.workload.replicas for job in problem.jobs)
    standing = settled.standing(workloads, problem.nodes) if short else Counter()
    placements = _merged(workloads, settled.placements, others)
    empty = any(node.labels and not state.touched[node.number] for node in problem.nodes)
    final = not (options.allow_eviction or empty or any(not run.running for run in others))
    plan = Plan.model_construct(
        version=1,
        tier=options.tier,
        allow_mixed_compute=options.allow_mixed_compute,
        cards=_cards(fleet, writer.cards(), previous),
        placements=placements,
        unplaced=explain(state.problem, state, settled.nodes, others, writer.before, standing),
        totals=_totals(workloads, placements, settled, state, writer.totals(others, proven=False), fleet.cards),
        notes=Writer(fleet, state.problem, state, held, current).notes(others),
    )
    return plan, final


def _merged(
    workloads: Workloads, settled: Mapping[str, tuple[Placement, ...]], others: Iterable[Placement]
) -> tuple[Placement, ...]:
    by_name: dict[str, list[Placement]] = {}
    for run in others:
        by_name.setdefault(run.workload, []).append(run)
    reasons: dict[str, str] = {}
    found: list[Placement] = []
    for name in sorted(workload.name for workload in workloads.workloads):
        found += (_kept(run, reasons) for run in settled[name]) if name in settled else by_name.get(name, ())
    return tuple(found)


def _kept(run: Placement, reasons: dict[str, str]) -> Placement:
    """The same, running. reasons: what was made of each before; plans repeat few."""
    if run.reason not in reasons:
        parts = [part for part in run.reason.split("; ") if not part.startswith("after switching") and part != _RUNS]
        reasons[run.reason] = "; ".join([*parts, _RUNS])
    if run.running and run.reason == reasons[run.reason]:
        return run
    return run.model_copy(update={"running": True, "reason": reasons[run.reason]})


def _cards(fleet: Fleet, planned: Iterable[CardPlan], previous: Plan) -> tuple[CardPlan, ...]:
    new = {(card.node, card.card): card for card in planned}
    old = {(card.node, card.card): card for card in previous.cards}
    found = []
    for node in fleet.nodes:
        for card in node.cards:
            key = (node.name, card.index)
            there = new.get(key) or old[key]
            found.append(
                there if key in new or there.was == there.mode else there.model_copy(update={"was": there.mode})
            )
    return tuple(found)


def _totals(
    workloads: Workloads, placements: tuple[Placement, ...], settled: Settled, state: State, others: Totals, cards: int
) -> Totals:
    asked: Counter[str] = Counter()
    for workload in workloads.workloads:
        asked[workload.priority] += workload.replicas
    placed = Counter(run.priority for run in placements)
    used = len({(run.node, card) for run in placements for card in run.cards})
    # Whole cards the others need at least are rounded up already, so one of them may be the settled ones' too.
    bound = min(used, ceil(settled.bound - 1e-6 + max(0, cards_bound(state) - 1)))
    return others.model_copy(
        update={
            "asked": {priority: asked[priority] for priority in PRIORITIES},
            "placed": {priority: placed[priority] for priority in PRIORITIES},
            "cards": cards,
            "cards_used": used,
            "bound": bound,
            "gap": round((used - bound) / bound, 4) if bound else 0.0,
        }
    )


# --- what is different ----------------------------------------------------------------------------------------------


def _compared(plan: Plan, previous: Plan, fleet: Fleet, settled: Settled | None, why: str) -> Replanned:
    """settled: who was not even looked at; None where the whole planner made the plan."""
    same = settled.placements if settled else {}
    before = {run.id: run for run in previous.placements if run.workload not in same}
    after = {run.id: run for run in plan.placements if run.workload not in same}
    both = [(run, after[name]) for name, run in before.items() if name in after]
    why_moved = _Why(fleet, None if settled else plan)
    moved = {new.id: why_moved.of(old, new) for old, new in both if not same_place(old, new)}
    anew = ((new.id, changes_at_start(old, new)) for old, new in both if new.id not in moved)
    return Replanned(
        plan=plan,
        stays=len(previous.placements) - len(before) + len(both) - len(moved),
        started=tuple(name for name in after if name not in before),
        stopped=tuple(name for name in before if name not in after),
        moved=moved,
        changed={name: ", ".join(what) for name, what in anew if what},
        local=settled is not None,
        why=why,
    )


class _Why:
    """Why a replica moves. whole: the plan of the whole planner, who alone takes a place from somebody."""

    def __init__(self, fleet: Fleet, whole: Plan | None) -> None:
        self.modes = {node.name: {card.index: card.current for card in node.cards} for node in fleet.nodes}
        self.by_device = whole.by_device if whole else {}

    def of(self, old: Placement, new: Placement) -> str:
        return f"{where(old)} → {where(new)}: {self._reason(old, new)}"

    def _reason(self, old: Placement, new: Placement) -> str:
        modes = self.modes.get(old.node)
        if modes is None:
            return f"{old.node} is gone"
        if lost := [card for card in old.cards if modes.get(card) != old.mode]:
            return f"{old.node} card {lost[0]} is gone, or not in {old.mode}"
        if old.need_gib != new.need_gib or old.tp != new.tp:
            return f"it takes {new.tp} x {new.need_gib} GiB now, not {old.tp} x {old.need_gib}"
        holders = {run.id for device in old.devices for run in self.by_device.get((old.node, *device), ())}
        return f"it makes way for {_some(sorted(holders))}" if holders else "it may not stand there any more"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
