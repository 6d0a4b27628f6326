"""A generation: policies that were read together, compiled and tried."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from aim_guardrail.detectors.base import Asked, BatchDetector, Passage
from aim_guardrail.pipeline import DetectorFailed, Guard, Session
from aim_guardrail.policy import Direction, Policy, PolicySet

_TRIAL = "Is everything all right? Write to jane.doe@example.com or call 4111 1111 1111 1111."
_DIRECTIONS: tuple[Direction, ...] = ("prompt", "answer")
#: A model that is slower with one sentence is of no use to anybody's budget.
_TRIAL_S = 30.0

Guards = Mapping[str | None, Guard]
"""By tenant; None: of everybody who has none of their own."""


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(eq=False)
class Generation:
    """What one reading of the policies came to; ``with`` it, a request is one of its users.

    Attributes:
        shadows: the candidates' guards, by the tenant they are for.
        users: how many requests it serves; counted on the event loop.
        idle: set while there are none.
    """

    policies: PolicySet
    guards: Guards
    shadows: Guards
    users: int = field(default=0)
    idle: asyncio.Event = field(default_factory=_set)

    def __enter__(self) -> Self:
        self.users += 1
        self.idle.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.users -= 1
        if not self.users:
            self.idle.set()

    @classmethod
    def load(cls, policies: PolicySet, reuse: Self | None = None) -> Self:
        """Compile the policies; blocking. Engines are shared among them, and with `reuse`, whoever's they were there.

        Raises:
            DetectorFailed: a detector cannot be loaded, or an inline one fails on a plain sentence.
        """
        loaded = list(reuse.all_guards) if reuse is not None else []

        def compiled(policy: Policy) -> Guard:
            guard = Guard.load(policy, Guard.together(loaded) if loaded else None)
            _try_inline(guard)
            loaded.append(guard)
            return guard

        guards = {tenant: compiled(policies.of(tenant)) for tenant in (None, *policies.tenants)}
        shadows = {tenant: compiled(policy).apart() for tenant, policy in policies.shadows.items()}
        return cls(policies, guards, shadows)

    @property
    def all_guards(self) -> Iterable[Guard]:
        """The guards of all its policies. Shadows first: of what both have loaded, it is the others' that is reused."""
        return (*self.shadows.values(), *self.guards.values())

    @property
    def detectors(self) -> dict[int, BatchDetector]:
        """The batch detectors of all its policies, by their identity."""
        bounded = [held for guard in self.all_guards for held in guard.stages.detectors.values()]
        return {id(held.detector): held.detector for held in bounded}

    def guard_for(self, tenant: str | None) -> Guard:
        """The guard for that tenant's callers."""
        return self.guards[tenant if tenant in self.guards else None]

    def shadow_for(self, tenant: str | None) -> Guard | None:
        """The candidate that is judged beside it. One for everybody is none for a tenant with a policy of its own."""
        own = self.shadows.get(tenant)
        return own if own is not None or tenant in self.guards else self.shadows.get(None)


def _try_inline(guard: Guard) -> None:
    """Judge a sentence. Raises DetectorFailed."""
    for direction in _DIRECTIONS:
        failed = guard.check(direction, _TRIAL, Session()).verdict.degraded
        if failed:
            raise DetectorFailed(failed[0], "fails on a plain sentence")


async def try_models(detectors: Iterable[BatchDetector]) -> None:
    """Have the models among them judge a sentence. Remote judges are not asked: one that is down now says nothing of a
    policy, and would keep every other change of it from coming into force.

    Raises:
        DetectorFailed: one cannot.
    """
    for detector in detectors:
        if detector.cost != "model":
            continue
        try:
            async with asyncio.timeout(_TRIAL_S):
                await detector.scan_batch([Passage(_TRIAL, "prompt")], Asked(time.monotonic() + _TRIAL_S))
        except Exception as error:  # the edge of third-party engines: name the one that does not work
            raise DetectorFailed(detector.family, f"fails on a plain sentence ({type(error).__name__})") from error
