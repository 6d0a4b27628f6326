"""From settings to queues: one policy for the process, a queue for each engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry

from aim_kserve.identity import QosClass
from aim_runtime.admission.engine import InTurn
from aim_runtime.admission.estimate import Estimate
from aim_runtime.admission.levels import Levels
from aim_runtime.admission.metrics import ClassMeters
from aim_runtime.engines.base import Engine
from aim_runtime.qos.buckets import Buckets
from aim_runtime.qos.lengths import Lengths
from aim_runtime.qos.policy import QosPolicy
from aim_runtime.qos.scheduler import Scheduler
from aim_runtime.qos.slo import Slo


@dataclass(frozen=True, slots=True)
class _Known:
    """Of one model, whichever of its engines answers, and when it is loaded again."""

    estimate: Estimate
    lengths: Lengths
    slo: Slo


class ServiceLevels:
    """Puts engines behind queues. What a tenant may have is counted over all of them together.

    Args:
        policy: of the process.
        clock: seconds; never goes back.
    """

    def __init__(self, policy: QosPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy, self._clock = policy, clock
        self._rates = Buckets(policy.limits, clock)
        self._models: dict[str, _Known] = {}

    def in_turn(
        self,
        engine: Engine,
        model: str,
        own: QosClass,
        latency_slo_ms: float | None = None,
        registry: CollectorRegistry = REGISTRY,
    ) -> InTurn:
        """``engine``, not loaded yet, behind a queue.

        Args:
            model: the served name.
            own: the class of requests whose caller has none.
            latency_slo_ms: within which that class is promised its first token, whatever the policy says.
        """
        policy = self._policy.of_model(own, latency_slo_ms)
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = _Known(Estimate(), Lengths(), Slo(policy, self._clock))
        rule = policy.enforcement

        def make(slots: int, kv_tokens: int | None, parks: bool) -> Scheduler:
            return Scheduler(
                policy,
                self._clock,
                slots=slots,
                kv_tokens=kv_tokens,
                parks=parks,
                lengths=known.lengths,
                burns=lambda: rule is not None and known.slo.throttled(rule.throttle),
            )

        return InTurn(
            engine,
            model,
            Levels(policy, own),
            make,
            ClassMeters(model, known.slo, registry),
            self._rates if policy.limits else None,
            estimate=known.estimate,
            replay=policy.replay,
            clock=self._clock,
        )
