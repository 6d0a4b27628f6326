"""How well promises were kept: the share of good requests per class over three windows, and what that costs the budget.

burn rate = (1 - attainment) / (1 - target): at 1 the error budget lasts exactly as long as the target's period; the
multi-window rule (act while a short and a long window burn) is the SRE workbook's, chapter "Alerting on SLOs".
An event costs three additions, memory is 192 pairs of counts per class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from aim_kserve.identity.caller import QosClass

from .policy import QosPolicy
from .request import CLASSES

Window = Literal["5m", "1h", "3d"]
#: Window → (seconds of a step, steps): what happened leaves a window a step at a time.
WINDOWS: Mapping[Window, tuple[int, int]] = {"5m": (5, 60), "1h": (60, 60), "3d": (3600, 72)}
#: Enforcement ends when the short window burns no more than so much of the rate at which it began.
_RELEASE = 0.5
#: With fewer requests in the long window one bad request would be an alarm.
_FEWEST = 10


class _Ring:
    """Good and all requests of the last ``steps`` steps."""

    def __init__(self, step_s: int, steps: int) -> None:
        self._step_s, self._steps = step_s, steps
        self._good, self._all = [0] * steps, [0] * steps
        self._step: int | None = None
        self.good = self.all = 0

    def move_to(self, now: float) -> None:
        """Forget what has left the window; a clock that goes backwards forgets nothing."""
        step = int(now // self._step_s)
        first = step if self._step is None else self._step + 1
        for passed in range(max(first, step - self._steps + 1), step + 1):
            at = passed % self._steps
            self.good -= self._good[at]
            self.all -= self._all[at]
            self._good[at] = self._all[at] = 0
        self._step = max(step, first - 1)

    def add(self, good: bool, now: float) -> None:
        self.move_to(now)
        at = (self._step or 0) % self._steps
        self._good[at] += good
        self._all[at] += 1
        self.good += good
        self.all += 1


class Slo:
    """Args:
    policy: which class is promised what, and what is done when a promise is at risk.
    clock: seconds.
    """

    def __init__(self, policy: QosPolicy, clock: Callable[[], float]) -> None:
        self._enforcement, self._clock = policy.enforcement, clock
        self._promised = {each: slo for each in CLASSES if (slo := policy.of(each).slo) is not None}
        self._rings = {each: {window: _Ring(*size) for window, size in WINDOWS.items()} for each in self._promised}
        self._throttling = False

    def promised_s(self, qos_class: QosClass) -> float | None:
        """Within which a first token of that class is promised; None: it is not."""
        slo = self._promised.get(qos_class)
        return None if slo is None else slo.ttft_ms / 1e3

    def observe(self, qos_class: QosClass, ttft_s: float | None, ok: bool) -> None:
        """A request of that class has ended.

        Args:
            ttft_s: its first token came so long after its arrival; None: it has none, and there is nothing to be late.
            ok: it was answered: not refused for want of room or time, and it did not fail. What was the client's doing
                (a bad request, leaving) is no observation.
        """
        slo = self._promised.get(qos_class)
        if slo is None:
            return
        good = ok and (ttft_s is None or ttft_s * 1000 <= slo.ttft_ms)
        for ring in self._rings[qos_class].values():
            ring.add(good, self._clock())

    def attainment(self, qos_class: QosClass, window: Window) -> float | None:
        """The share of good ones. None: nothing is promised to that class, or there was no request."""
        good, every = self._counts(qos_class, window)
        return good / every if every else None

    def burn(self, qos_class: QosClass, window: Window) -> float | None:
        """How many times faster than it may the class uses up its error budget; None as for ``attainment``."""
        attained = self.attainment(qos_class, window)
        return None if attained is None else (1 - attained) / (1 - self._promised[qos_class].target)

    def throttled(self, qos_class: QosClass) -> bool:
        """Whether that class is to be held back now: the policy's, from when a class above burns too fast over 5
        minutes and 1 hour until all above have calmed down."""
        if self._enforcement is None or qos_class != self._enforcement.throttle:
            return False
        above = CLASSES[: CLASSES.index(qos_class)]
        rate = self._enforcement.burn_rate
        if self._throttling:
            self._throttling = any((self.burn(each, "5m") or 0.0) > rate * _RELEASE for each in above)
        else:
            self._throttling = any(self._burns(each, rate) for each in above)
        return self._throttling

    def _burns(self, qos_class: QosClass, rate: float) -> bool:
        if self._counts(qos_class, "1h")[1] < _FEWEST:
            return False
        return min(self.burn(qos_class, "5m") or 0.0, self.burn(qos_class, "1h") or 0.0) > rate

    def _counts(self, qos_class: QosClass, window: Window) -> tuple[int, int]:
        rings = self._rings.get(qos_class)
        if rings is None:
            return 0, 0
        ring = rings[window]
        ring.move_to(self._clock())
        return ring.good, ring.all
