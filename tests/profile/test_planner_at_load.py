"""Loaded fleets: all that matters most is placed, and of the rest what totals allow; and the programme behind it.

One fleet as a test; ``make soak`` plans ten of 192 cards and three of 2,000 (``SOAK_LOADED``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import product
from random import Random

import pytest

from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import PRIORITIES, PlanOptions
from aim_profile.plans.search.aggregate import aim
from aim_profile.plans.search.intake import make_problem
from aim_profile.plans.search.problem import with_avoided
from aim_profile.plans.search.program import Program
from loaded_fleets import loaded

SEEDS = int(os.environ.get("SOAK_LOADED", "1"))
SIZES = [(1_000, 192, seed) for seed in range(1, SEEDS + 1)] + [(10_000, 2_000, s) for s in range(1, SEEDS // 3 + 1)]


@pytest.mark.parametrize(("count", "cards", "seed"), SIZES)
def test_a_loaded_fleet_carries_what_totals_allow(count: int, cards: int, seed: int):
    fleet, workloads = loaded(count, cards, seed)
    aimed = aim(with_avoided(make_problem(fleet, workloads, PlanOptions())))
    assert aimed is not None
    bound = [-number for number in aimed.placed]
    placed = Counter((run.priority, run.kind == "serve") for run in make_plan(fleet, workloads).placements)
    reached = [placed[priority, serves] for priority in PRIORITIES for serves in (True, False)]
    print(f"{count} x {cards}, seed {seed}: {sum(reached)} placed, {reached} of {bound}")
    assert reached[:4] >= bound[:4]
    assert sum(reached[4:]) >= 0.99 * sum(bound[4:])


def test_a_card_is_not_left_to_a_small_model_while_guardrails_that_matter_more_wait():
    """Counts level by level gave whole cards to what came first and left nothing that many small ones could share."""
    fleet, workloads = loaded(160, 32, 1)
    short = {left.priority for left in make_plan(fleet, workloads, PlanOptions(effort=0)).unplaced}
    assert short <= {"low"}


def _programmes() -> Iterator[tuple[list[int], list[tuple[list[int], int]], list[list[int]]]]:
    for seed in range(25):
        chance = Random(seed)
        upper = [chance.randint(1, 3) for _ in range(4)]
        rows = [([chance.randint(0, 3) for _ in upper], chance.randint(2, 9)) for _ in range(3)]
        yield upper, rows, [[chance.randint(-3, 2) for _ in upper] for _ in range(3)]


@pytest.mark.parametrize("small", [True, False])
def test_objectives_are_least_one_after_the_other(small: bool):
    for upper, rows, objectives in _programmes():
        program = Program(small=small)
        for most in upper:
            program.variable(most, hard=not small)
        for factors, limit in rows:
            program.most(dict(enumerate(factors)), limit)
        found = program.solve([dict(enumerate(factors)) for factors in objectives])
        assert found is not None
        allowed = [
            values
            for values in product(*(range(most + 1) for most in upper))
            if all(_sum(factors, values) <= limit for factors, limit in rows)
        ]
        assert tuple(found) in allowed
        best = min(tuple(_sum(factors, values) for factors in objectives) for values in allowed)
        assert tuple(_sum(factors, tuple(found)) for factors in objectives) == best


def _sum(factors: list[int], values: tuple[int, ...]) -> int:
    return sum(factor * value for factor, value in zip(factors, values, strict=True))
