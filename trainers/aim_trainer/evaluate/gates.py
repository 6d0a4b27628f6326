"""Bounds that a tuned model must keep; pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from aim_trainer.errors import GateError
from aim_trainer.job.judged import Gate


@dataclass(frozen=True, slots=True)
class GateResult:
    """One bound of a gate. value: what was measured (of minDelta and maxDelta tuned − base); None: nothing could be,
    for `reason`, and the gate fails.
    """

    metric: str
    bound: str
    limit: float
    value: float | None
    passed: bool
    reason: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.metric}: {self.bound} {self.limit:g}: not measured: {self.reason}"
        return f"{self.metric}: {self.value:.6g}, {self.bound} {self.limit:g}"


def held(
    gates: Sequence[Gate],
    base: Mapping[str, float],
    tuned: Mapping[str, float],
    unmeasured: Mapping[str, str],
) -> list[GateResult]:
    """A result for each bound of each gate, in their order. unmeasured: why a metric is in neither."""
    return [_result(gate.metric, *bound, base, tuned, unmeasured) for gate in gates for bound in _bounds(gate)]


def require(results: Sequence[GateResult]) -> None:
    """Raises GateError, naming each bound that was not kept."""
    failed = [result for result in results if not result.passed]
    if failed:
        lines = "\n".join(f"  {result}" for result in failed)
        told = f"{len(failed)} of {len(results)} gates failed; what was trained is kept:\n{lines}"
        raise GateError(told, field="spec.validation.gates")


def _bounds(gate: Gate) -> Iterator[tuple[str, float]]:
    named = {"min": gate.min, "max": gate.max, "minDelta": gate.min_delta, "maxDelta": gate.max_delta}
    return ((bound, limit) for bound, limit in named.items() if limit is not None)


def _result(
    metric: str,
    bound: str,
    limit: float,
    base: Mapping[str, float],
    tuned: Mapping[str, float],
    unmeasured: Mapping[str, str],
) -> GateResult:
    value = tuned.get(metric)
    if value is not None and bound.endswith("Delta"):
        value = value - base[metric] if metric in base else None
    if value is None:
        return GateResult(metric, bound, limit, None, False, unmeasured.get(metric, "nobody measured it"))
    if math.isnan(value):
        return GateResult(metric, bound, limit, None, False, "it is not a number")
    return GateResult(metric, bound, limit, value, value >= limit if bound.startswith("min") else value <= limit)
