"""A plan for each part of a day in which the same workloads run, and what changes at each edge.

The busiest part is planned first; from there the day goes round, each part changing as little of the one before as it
can (replan): who runs in both stays, and who comes again comes back to its place where that is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from aim_profile.plans.search.intake import make_problem
from aim_profile.serving.evidence import Measurement

from .fleet import Fleet
from .make import make_plan, without_loads
from .plan import Placement, Plan, PlanOptions
from .replan import replan
from .running import same_place
from .window import Window, minute_of, parts_of_day, window_of
from .workload import Workload, WorkloadError, Workloads


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WindowPlan(_Frozen):
    """The plan of one part of the day. window: `22:00-06:00`, on the clock of the day's time zone."""

    window: str
    plan: Plan


class DayPlan(_Frozen):
    """The plans of a day, in its order; the first one's part holds midnight. Each alone is a plan as any other."""

    version: Literal[1] = 1
    time_zone: str = "UTC"
    windows: tuple[WindowPlan, ...]

    def at(self, time: str) -> WindowPlan:
        """The plan in force at that time of day. Raises WorkloadError for what is no time."""
        try:
            minute = minute_of(time)
        except ValueError as problem:
            raise WorkloadError(str(problem), field="at", value=time) from problem
        return next(each for each in self.windows if _part(each.window).holds(minute))

    def edges(self) -> Iterable[tuple[WindowPlan, WindowPlan]]:
        """Each plan with the one that follows it."""
        return zip(self.windows, (*self.windows[1:], self.windows[0]), strict=True)


def _part(written: str) -> Window:
    start, _, end = written.partition("-")
    return Window(minute_of(start), minute_of(end))


def has_windows(workloads: Workloads) -> bool:
    """Whether not all of them run all day."""
    return any(workload.window is not None for workload in workloads.workloads)


def plan_day(
    fleet: Fleet,
    workloads: Workloads,
    options: PlanOptions | None = None,
    measurements: Sequence[Measurement] = (),
) -> DayPlan:
    """The plans of a day. Replicas that may be evicted (low priority) make way in a part of the day where others would
    have no device else, and nobody else moves. Raises WorkloadError as make_plan does.
    """
    options = options or PlanOptions()
    workloads, derived = without_loads(fleet, workloads, options, measurements)
    parts = [(part, _active(workloads, part)) for part in _parts(workloads)]
    first = _busiest(fleet, workloads, options, parts)
    round_ = [*range(first, len(parts)), *range(first)]
    plans: dict[int, Plan] = {}
    for at in round_:
        asked = parts[at][1]
        plans[at] = _next(fleet, asked, options, list(plans.values())) if plans else make_plan(fleet, asked, options)
    found = []
    for at, (part, asked) in enumerate(parts):
        names = {workload.name for workload in asked.workloads}
        how = tuple(each for each in derived if each.workload in names)
        found.append(WindowPlan.model_construct(window=str(part), plan=plans[at].model_copy(update={"derived": how})))
    return DayPlan.model_construct(version=1, time_zone=workloads.time_zone, windows=tuple(found))


def _parts(workloads: Workloads) -> Sequence[Window]:
    return parts_of_day({window_of(each.window) for each in workloads.workloads if each.window})


def _active(workloads: Workloads, part: Window) -> Workloads:
    """What runs then, as if it always did; without those that keep away from workloads that do not run then."""
    here = [each for each in workloads.workloads if each.window is None or window_of(each.window).holds(part.start)]
    names = {workload.name for workload in here}
    return Workloads.model_construct(
        version=1, time_zone=workloads.time_zone, workloads=tuple(_alone(workload, names) for workload in here)
    )


def _alone(workload: Workload, names: set[str]) -> Workload:
    others = tuple(name for name in workload.anti_affinity if name in names)
    if workload.window is None and others == workload.anti_affinity:
        return workload
    return workload.model_copy(update={"window": None, "anti_affinity": others})


def _busiest(
    fleet: Fleet, workloads: Workloads, options: PlanOptions, parts: Sequence[tuple[Window, Workloads]]
) -> int:
    """The part in which most is asked for, by the cards it takes at least."""
    always = workloads.model_copy(update={"workloads": tuple(_alone(w, set()) for w in workloads.workloads)})
    problem = make_problem(fleet, always, options)
    cards = {job.workload.name: job.size * job.workload.replicas for job in problem.jobs}
    asked = [sum(cards[workload.name] for workload in active.workloads) for _, active in parts]
    return max(range(len(parts)), key=lambda at: (asked[at], -at))


def _next(fleet: Fleet, workloads: Workloads, options: PlanOptions, before: list[Plan]) -> Plan:
    """The part of the day after those planned, of which the last comes just before."""
    last = before[-1]
    evicting = options.model_copy(update={"allow_eviction": True})
    back = _come_back(last, before[:-1], {workload.name for workload in workloads.workloads})
    known = last.model_copy(update={"placements": (*last.placements, *back)})
    found = replan(fleet, workloads, known, evicting).plan
    runs = {run.id: run for run in last.placements}
    return found.model_copy(update={"placements": tuple(_told(run, runs) for run in found.placements)})


def _come_back(last: Plan, before: Sequence[Plan], wanted: set[str]) -> list[Placement]:
    """Where those that do not run now stood when they last did, as far as nobody has those devices now."""
    taken = set(last.by_device)
    seen = {run.workload for run in last.placements}
    modes = {(card.node, card.card): card.mode for card in last.cards}
    found = []
    for plan in reversed(before):
        stood = [run for run in plan.placements if run.workload in wanted and run.workload not in seen]
        for run in stood:
            devices = {(run.node, *device) for device in run.devices}
            if not devices & taken and all(modes.get((run.node, card)) == run.mode for card in run.cards):
                taken |= devices
                found.append(run)
        seen |= {run.workload for run in stood}
    return found


def _told(run: Placement, before: Mapping[str, Placement]) -> Placement:
    """Running only where it did just before."""
    was = before.get(run.id)
    if not run.running or (was is not None and same_place(was, run)):
        return run
    reason = run.reason.replace("it runs here now", "where it was before")
    return run.model_copy(update={"running": False, "reason": reason})
