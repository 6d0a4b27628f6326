"""How good a placement can be at all: a bound on the cards it needs, and whether nothing can be better."""

from __future__ import annotations

from math import ceil

from .problem import Job, Problem
from .state import State


def is_best(state: State) -> bool:
    """Whether no placement can be better: everything placed, nothing switched or moved, no fewer cards possible."""
    problem = state.problem
    everything = sum(state.placed) == problem.replicas
    nothing_moved = state.changes() == (0, 0) and state.stay == len(problem.running) and not state.unproven
    return everything and nothing_moved and state.cards_used == cards_bound(state)


def cards_bound(state: State) -> int:
    """Fewest cards any placement of the same replicas needs that changes no more modes than this one.

    Each replica takes at least its smallest share of a card over the kinds it could get; without a change only kinds
    as found are there, and none that spans partitions it should avoid where this one does without.
    """
    problem = state.problem
    found = {card.as_found for node in problem.nodes for card in node.cards}
    kinds = found if state.changes() == (0, 0) else set(range(len(problem.kinds)))
    total = 0.0
    for job in problem.jobs:
        if state.count[job.index]:
            # Without a replica over partitions it should avoid, no plan as good has one.
            allowed = kinds if state.unproven else kinds - job.avoided.keys()
            total += state.count[job.index] * _least_share(job, problem, allowed)
    return ceil(total - 1e-6)


def _least_share(job: Job, problem: Problem, kinds: set[int]) -> float:
    """Shared devices count by bytes: limit of budget."""
    shares = []
    for kind, option in job.options.items():
        if kind in kinds:
            whole = option.devices / problem.kinds[kind].partitions
            budget = problem.kinds[kind].device_bytes * 0.9
            shares.append(whole if job.limit is None else whole * min(1.0, job.limit / budget))
    return min(shares, default=0.0)
