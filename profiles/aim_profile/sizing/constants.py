"""The time of a step and of a first token, by a model whose constants come from what was observed.

    step   = launch + per_sequence * n + slowdown_f * (weights + cache of n) / bandwidth + (n / answer) * prefill
    prefill = start + slowdown_g * operations of the prompt / peak
    first token = prefill + apart + waits * step

n: sequences that make tokens; slowdown_f, slowdown_g >= 1: how far the device stays below its peaks; the rest >= 0.
Each sequence needs one prefill for every `answer` steps; the others wait for it, which is the last term of a step.

**Ranges, not a best fit.** A table of one model on one device cannot tell its constants apart: launch and weights are
one sum in it. So nothing is picked. Every set of constants counts that explains every observed row up to `error`, and a
prediction is the least and the most that such a set gives: two linear programmes. `error` is twice the least with which
any set explains all rows (a linear programme too). Twice, because at the least itself the set is hardly more than a
point, though a second run of the same would differ from the first by as much again as the first from the model. It is
never taken below 5 %: a few rows can be met exactly and are no surer for it.

**Other devices and models.** Bytes and operations are counted, so bandwidth and peak scale by themselves. How a
constant in milliseconds scales is not known from one device. Launching costs the host the same for a part of a card;
but a part also has fewer compute units for what runs beside the matrix units, and as many engines more share the host.
So it is between the same (the least) and in inverse proportion to the share of the compute units (the most); likewise
between the same and in proportion to the model's layers, and for what a sequence costs to its operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from highspy import ObjSense

from aim_profile.errors import SizingError
from aim_profile.solver import INFINITY, Solver

from .asked import RequestShape
from .work import Speeds, Work

End = Literal["least", "most"]
Part = Literal["launch", "bandwidth", "compute"]
_NAMES: tuple[Part, ...] = ("launch", "bandwidth", "compute")

LEAST_ERROR = 0.05
# Beyond it the rows are not what this model describes.
MOST_ERROR = 0.5
# In the order of the columns below: launch, per_sequence, slowdown_f, start, slowdown_g, apart, waits.
_FLOORS = (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
_PARTS: tuple[Part | None, ...] = ("launch", "launch", "bandwidth", "launch", "compute", None, None)

_Row = tuple[float, float, float, float, float, float, float]


class Observed(NamedTuple):
    """One row of evidence: n sequences at once, milliseconds between tokens and to the first (means or medians)."""

    work: Work
    shape: RequestShape
    sequences: float
    itl_ms: float
    ttft_ms: float | None


class _Scale(NamedTuple):
    """By what the constants in milliseconds are multiplied, from where they were observed to where they are wanted."""

    step: float
    sequence: float
    host: float


class Constants:
    """What rows of one model on one kind of device say of the constants.

    error: relative, see above; sequences: the most that were observed at once.
    """

    def __init__(self, observed: Sequence[Observed], speeds: Speeds) -> None:
        """Raises SizingError: too few rows to bound anything, or rows that no constants explain."""
        if not any(row.ttft_ms is not None for row in observed):
            raise SizingError("evidence: no row says when first tokens came", field="evidence")
        self._here, self._speeds = observed[0].work, speeds
        self._rows = [each for row in observed for each in self._equations(row)]
        least = self._least_error()
        if least > MOST_ERROR:
            why = f"evidence: no constants explain its rows within {MOST_ERROR:.0%} (the least is {least:.0%})"
            raise SizingError(why, field="evidence", value=least)
        self.error = max(2 * least, LEAST_ERROR)
        self.sequences = max(row.sequences for row in observed)
        self._solver = _new_solver(_FLOORS)
        for row, value in self._rows:
            _add_row(self._solver, value * (1 - self.error), value * (1 + self.error), row)

    def step_ms(self, work: Work, speeds: Speeds, shape: RequestShape, sequences: float, end: End) -> float:
        """Milliseconds of a step, which is the time between two tokens of a sequence."""
        return self._reach(self._step(work, speeds, shape, sequences, end), end)

    def first_token_ms(self, work: Work, speeds: Speeds, shape: RequestShape, step_ms: float, end: End) -> float:
        """Milliseconds to the first token where steps take so long."""
        return self._reach(self._first_token(work, speeds, shape, step_ms, end), end)

    def may_fill(self, work: Work, speeds: Speeds, shape: RequestShape, sequences: float) -> tuple[Part, ...]:
        """What may take half of the longest step or more, by some constants that count; else what may take most."""
        row = self._step(work, speeds, shape, sequences, "most")
        step_ms = self._reach(row, "most")
        longest = {part: self._reach(_only(row, part), "most") for part in _NAMES}
        found = tuple(part for part in _NAMES if longest[part] >= step_ms / 2)
        return found or (max(_NAMES, key=lambda part: longest[part]),)

    def _equations(self, row: Observed) -> list[tuple[_Row, float]]:
        step = (self._step(row.work, self._speeds, row.shape, row.sequences, "most"), row.itl_ms)
        if row.ttft_ms is None:
            return [step]
        return [step, (self._first_token(row.work, self._speeds, row.shape, row.itl_ms, "most"), row.ttft_ms)]

    def _step(self, work: Work, speeds: Speeds, shape: RequestShape, sequences: float, end: End) -> _Row:
        scale = self._scale(work, speeds, end)
        read = work.weights_read(sequences)[end == "most"] + work.cache_bytes * sequences
        prefills = sequences / shape.answer_tokens
        launch, per_sequence = scale.step, scale.sequence * sequences
        return (
            launch,
            per_sequence,
            _ms(read, speeds.bytes_per_s),
            *_prefill(work, speeds, shape, scale, prefills),
            0,
            0,
        )

    def _first_token(self, work: Work, speeds: Speeds, shape: RequestShape, step_ms: float, end: End) -> _Row:
        scale = self._scale(work, speeds, end)
        return 0, 0, 0, *_prefill(work, speeds, shape, scale, 1.0), scale.host, step_ms

    def _scale(self, work: Work, speeds: Speeds, end: End) -> _Scale:
        there, here = self._speeds, self._here
        pick = max if end == "most" else min
        host = pick(1.0, there.share / speeds.share)
        layers = work.layers / here.layers
        operations = _ms(work.operations, speeds.operations_per_s) * speeds.share
        before = _ms(here.operations, there.operations_per_s) * there.share
        costs = operations / before if operations and before else work.operations / here.operations
        return _Scale(host * pick(1.0, layers), host * pick(1.0, layers, costs), host)

    def _least_error(self) -> float:
        """Solves for the constants and the error at once, so that it is the least over all constants."""
        solver = _new_solver((*_FLOORS, 0.0))
        solver.changeColCost(len(_FLOORS), 1.0)
        for row, value in self._rows:
            _add_row(solver, value, INFINITY, (*row, value))
            _add_row(solver, -INFINITY, value, (*row, -value))
        solver.run()
        return float(solver.getInfo().objective_function_value)

    def _reach(self, row: Sequence[float], end: End) -> float:
        """The least or the most of a row over all constants that count.

        It goes on from the last answer, which is several times as quick, and whose last digits depend on it: they go.
        """
        sense = ObjSense.kMaximize if end == "most" else ObjSense.kMinimize
        self._solver.changeObjectiveSense(sense)
        for column, factor in enumerate(row):
            self._solver.changeColCost(column, factor)
        self._solver.run()
        return float(f"{self._solver.getObjectiveValue():.9g}")


def _prefill(work: Work, speeds: Speeds, shape: RequestShape, scale: _Scale, times: float) -> tuple[float, float]:
    return scale.step * times, times * _ms(work.operations * shape.prompt_tokens, speeds.operations_per_s)


def _ms(amount: float, per_s: float | None) -> float:
    """Milliseconds at that peak; 0 where the peak is not known: nothing is said of it then."""
    return amount / per_s * 1000 if per_s else 0.0


def _only(row: _Row, part: Part) -> list[float]:
    """The row with what is of that part."""
    return [factor if of == part else 0.0 for factor, of in zip(row, _PARTS, strict=True)]


def _new_solver(floors: Sequence[float]) -> Solver:
    solver = Solver()
    for floor in floors:
        solver.addVar(floor, INFINITY)
    return solver


def _add_row(solver: Solver, low: float, high: float, row: Sequence[float]) -> None:
    solver.addRow(low, high, len(row), list(range(len(row))), list(row))
