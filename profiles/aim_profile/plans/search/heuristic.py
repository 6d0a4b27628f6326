"""The default planner: fast, deterministic, and for small fleets thorough.

A few strategies construct a placement each (build); the best score wins. Where the fleet is small enough for
`effort`, other modes are tried then (improve).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from .aggregate import Aim, aim
from .bins import Bin, Found, Held
from .bound import is_best
from .build import Builder, Strategy
from .improve import improve
from .problem import Modes, Problem, with_avoided
from .state import State

_STRATEGIES = (
    Strategy(),
    Strategy(lenient=False),
    Strategy(dense=True),
    Strategy(large_first=False),
    Strategy(fraction_first=True),
    Strategy(fraction_first=True, dense=True),
    Strategy(large_first=False, dense=True, lenient=False),
)


def solve(problem: Problem) -> State:
    """The best placement found. Deterministic: bounded by problem.effort (replicas examined), never by time.

    Only where that leaves a replica over, replicas may also run as they should avoid.
    """
    cost = problem.replicas + sum(len(node.cards) for node in problem.nodes) + 1
    tries = max(1, problem.effort // cost)
    wide = with_avoided(problem) if any(job.avoided for job in problem.jobs) else problem
    aimed = aim(wide)
    if aimed and aimed.unproven:
        best, left = _constructed(wide, aimed, tries)
        return _settled(best if aimed.reached(best) else improve(wide, best, left))
    best, left = _constructed(problem, aimed, tries)
    if aimed and aimed.reached(best):
        return best
    if sum(best.placed) == _placeable(problem) or wide is problem:
        return improve(problem, best, left)
    found, left = _constructed(wide, aimed, max(1, left))
    return _settled(improve(wide, min(found, best, key=State.score), left))


def _placeable(problem: Problem) -> int:
    """Replicas that some device holds."""
    return sum(job.workload.replicas for job in problem.jobs if job.options)


def _constructed(problem: Problem, aimed: Aim | None, tries: int) -> tuple[State, int]:
    """The best of a construction by each strategy, and the tries left."""
    starts: list[tuple[Modes, Aim | None]] = [(aimed.modes, aimed), (aimed.modes, None)] if aimed else []
    if not aimed or aimed.modes:
        starts.append(({}, None))
    lenient_only = not _leniency_matters(problem)
    best: State | None = None
    for strategy, (start, meant) in product(_STRATEGIES, starts):
        if best is not None and (is_best(best) or (aimed and aimed.reached(best))):
            break
        # The strict strategy always gets its turn where it matters: a pin never outranks a priority.
        if (tries > 0 or strategy == _STRATEGIES[1]) and (strategy.lenient or not lenient_only):
            tries -= 1
            state = Builder(problem, strategy, start, may_switch=True, aim=meant).build()
            best = state if best is None or state.score() < best.score() else best
    assert best is not None
    return best, tries


def _settled(state: State) -> State:
    """The same with each replica on one device that spans partitions it should avoid while such a device is free."""
    for bin_ in [bin_ for bin_ in state.bins if bin_.alive] if state.unproven else ():
        for held in list(bin_.held):
            # Who depends on a replica, or where it is bound, is not looked into: it stays.
            if bin_.kind.number in held.job.avoided and not held.fixed and held.job.rank == 0:
                _settle(state, bin_, held)
    return state


def _settle(state: State, bin_: Bin, held: Held) -> None:
    job = held.job
    options = {at: option for at, option in job.options.items() if at not in job.avoided}
    state.remove(bin_, held)
    found = state.find(replace(job, options=options))
    state.place(job, found or Found(bin_))


def _leniency_matters(problem: Problem) -> bool:
    return any(not running.fixed for running in problem.running) or any(job.pin for job in problem.jobs)
