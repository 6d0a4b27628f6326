"""Integer programmes whose objectives come one after the other, solved by HiGHS.

A solve is bounded by nodes of the search tree and by iterations, never by seconds, on one thread with a fixed seed: the
same programme has the same answer on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil

import highspy
import numpy as np

from aim_profile.solver import INFINITY, Solver

# Of one objective; what the search has found by then is the answer.
_MOST_NODES = 200
_MOST_ITERATIONS = 200_000
_TYPES = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
Terms = Mapping[int, float]


class Program:
    """Variables, rows over them, and (in `solve`) objectives. Variables are named by their number.

    small: no variable is harder than others, so that `solve` finds all at once.
    """

    def __init__(self, *, small: bool = False) -> None:
        self._small = small
        self._upper: list[float] = []
        self._hard: list[bool] = []
        self._rows: list[tuple[float, Terms, float]] = []

    def variable(self, most: int, *, hard: bool = False) -> int:
        """A whole number from 0 to `most`. hard: much depends on it, few are; `solve` finds these first."""
        self._upper.append(most)
        self._hard.append(hard)
        return len(self._upper) - 1

    def most(self, terms: Terms, limit: float) -> None:
        """The sum of these is at most `limit`."""
        self._rows.append((-INFINITY, terms, limit))

    def exactly(self, terms: Terms, value: float) -> None:
        """The sum of these is that."""
        self._rows.append((value, terms, value))

    def solve(self, objectives: Sequence[Terms]) -> list[int] | None:
        """The variables that make each objective least, each only where those before it stay as little.

        The hard ones are found first, with all others as fractions; then these, with the hard ones fixed. None: no
        answer was found within the bounds. Every objective has whole factors.
        """
        answer = self._in_turn(self._solver(), objectives)
        if answer is None or self._small:
            return None if answer is None else [round(value) for value in answer]
        fixed = {at: round(answer[at]) for at, hard in enumerate(self._hard) if hard}
        whole = self._in_turn(self._solver(fixed), objectives)
        return None if whole is None else [round(value) for value in whole]

    def _in_turn(self, solver: Solver, objectives: Sequence[Terms]) -> list[float] | None:
        answer: list[float] | None = None
        for terms in objectives:
            found = _least(solver, terms, len(self._upper), answer)
            if found is None:
                return answer
            answer = found
            columns = np.fromiter(terms, dtype=np.int32, count=len(terms))
            factors = np.fromiter(terms.values(), dtype=np.float64, count=len(terms))
            reached = ceil(_value(terms, answer) - 1e-6)
            solver.addRow(-INFINITY, reached, len(terms), columns, factors)
        return answer

    def _solver(self, fixed: Mapping[int, int] | None = None) -> Solver:
        solver = Solver()
        options: dict[str, bool | int | float | str] = {
            "parallel": "off",
            "random_seed": 1,
            "mip_max_nodes": _MOST_NODES,
            "simplex_iteration_limit": _MOST_ITERATIONS,
            "mip_rel_gap": 0.0,
            "mip_abs_gap": 0.3,  # objectives are whole numbers, or nearly: a fraction of a replica is none
        }
        for name, value in options.items():
            solver.setOptionValue(name, value)
        solver.passModel(self._model(fixed))
        return solver

    def _model(self, fixed: Mapping[int, int] | None) -> highspy.HighsLp:
        """All rows. fixed: the values of the hard variables; None: they alone are whole."""
        model = highspy.HighsLp()
        columns, rows = len(self._upper), len(self._rows)
        model.num_col_, model.num_row_ = columns, rows
        given = fixed or {}
        model.col_cost_ = np.zeros(columns)
        model.col_lower_ = np.array([given.get(at, 0) for at in range(columns)], dtype=np.float64)
        model.col_upper_ = np.array([given.get(at, most) for at, most in enumerate(self._upper)], dtype=np.float64)
        model.integrality_ = [_TYPES[self._small or fixed is not None or hard] for hard in self._hard]
        model.row_lower_ = np.array([low for low, _, _ in self._rows], dtype=np.float64)
        model.row_upper_ = np.array([high for _, _, high in self._rows], dtype=np.float64)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.array([0, *accumulate(len(terms) for _, terms, _ in self._rows)], dtype=np.int32)
        model.a_matrix_.index_ = np.array([at for _, terms, _ in self._rows for at in terms], dtype=np.int32)
        values = [factor for _, terms, _ in self._rows for factor in terms.values()]
        model.a_matrix_.value_ = np.array(values, dtype=np.float64)
        return model


def _least(solver: Solver, terms: Terms, columns: int, known: list[float] | None) -> list[float] | None:
    """The variables that make the sum least, from a known answer; None where none was found."""
    costs = np.zeros(columns)
    for at, factor in terms.items():
        costs[at] = factor
    solver.changeColsCost(columns, np.arange(columns, dtype=np.int32), costs)
    solver.clearSolver()  # a start from the answer before may end with it, though a better one is reported
    solver.run()
    solution = solver.getSolution()
    if not solution.value_valid or solver.getInfo().primal_solution_status != highspy.kSolutionStatusFeasible:
        return known
    found = list(solution.col_value)
    # Where the search ended at its bound, what was known may be better.
    return found if known is None or _value(terms, found) <= _value(terms, known) else known


def _value(terms: Terms, answer: list[float]) -> float:
    return sum(factor * answer[at] for at, factor in terms.items())
