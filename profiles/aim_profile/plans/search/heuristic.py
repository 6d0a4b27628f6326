"""The default planner: fast, deterministic, and for small fleets thorough.

A few strategies construct a placement each (build); the best score wins. Where the fleet is small enough for
`effort`, other modes are tried then (improve).
"""

from __future__ import annotations

from itertools import product

from .bound import is_best
from .build import Builder, Strategy
from .improve import improve
from .problem import Problem
from .sketch import Sketch
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
    """The best placement found. Deterministic: bounded by problem.effort (replicas examined), never by time."""
    cost = problem.replicas + sum(len(node.cards) for node in problem.nodes) + 1
    tries = max(1, problem.effort // cost)
    starts = Sketch(problem).starts()
    if {} not in starts:
        starts.append({})
    lenient_only = not _leniency_matters(problem)
    best: State | None = None
    for strategy, start in product(_STRATEGIES, starts):
        if best is not None and is_best(best):
            break
        # The strict strategy always gets its turn where it matters: a pin never outranks a priority.
        if (tries > 0 or strategy == _STRATEGIES[1]) and (strategy.lenient or not lenient_only):
            tries -= 1
            state = Builder(problem, strategy, start, may_switch=True).build()
            best = state if best is None or state.score() < best.score() else best
    assert best is not None
    return improve(problem, best, tries)


def _leniency_matters(problem: Problem) -> bool:
    return any(not running.fixed for running in problem.running) or any(job.pin for job in problem.jobs)
