"""How long one direction's check took, counted with what it came to."""

from __future__ import annotations

import time

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.blocked import Blocked
from aim_guardrail.pipeline.failures import DetectorTimedOut
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import Direction


class Timed:
    """``with``: what is done in it is one request's check of one direction, counted with its decision."""

    __slots__ = ("_direction", "_metrics", "_screening", "_started")

    def __init__(self, screening: Screening, metrics: Metrics, direction: Direction) -> None:
        self._screening, self._metrics, self._direction = screening, metrics, direction

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        decision = self._screening.actions[self._direction]
        if error is not None and not isinstance(error, Blocked):
            decision = "timeout" if isinstance(error.__cause__, DetectorTimedOut) else "error"
        use_case = self._screening.guard.policy.use_case
        spent_s = time.perf_counter() - self._started
        self._screening.spent_s[self._direction] += spent_s
        self._metrics.checked(self._direction, use_case, decision, spent_s)
