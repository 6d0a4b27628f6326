"""A shadow policy: a candidate judges what the policy in force has judged, afterwards, and the differences are counted.

Nothing of it reaches a client: it runs once a direction is over, one request at a time, on texts that were kept for it;
what does not fit its queue is dropped and counted. It shares engines and remembered verdicts with the policy in force,
never circuit breakers or estimates, and it uses the same CPUs.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from aim_guardrail.in_force import Policies
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.blocked import Blocked
from aim_guardrail.pipeline.cache import VerdictCache
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.course import Course
from aim_guardrail.pipeline.ruling import Ruling
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import Direction
from aim_guardrail.slots.slot import Slots
from aim_kserve.errors import ServingError

logger = logging.getLogger("aim.policy")

MOST_WAITING = 64
#: Of one direction: so much text is kept for a candidate, no more.
MOST_CHARS = 256 * 1024
_STRICT = ("allow", "flag", "redact", "block")


@dataclass(frozen=True, slots=True)
class _Job:
    course: Course
    slots: list[Slots]


class Shadow:
    """The candidates of the policies in force. All of it runs on the event loop.

    Args:
        sample: the share of requests that are judged, 0 to 1.
        cache: the verdicts that the policy in force remembers, too.
    """

    def __init__(
        self,
        policies: Policies,
        metrics: Metrics,
        sample: float,
        cache: VerdictCache | None = None,
        most: int = MOST_WAITING,
    ) -> None:
        self._policies, self._metrics, self._sample, self._cache, self._most = policies, metrics, sample, cache, most
        self._silent = Metrics(CollectorRegistry())  # what a candidate finds is nobody's detection
        self._waiting: deque[_Job] = deque()
        self._working: asyncio.Task[None] | None = None

    def __call__(self, context: RequestContext) -> Shadowing | None:
        """The witness of a request; None where it is not sampled, or has no candidate."""
        generation = self._policies.current
        if generation is None or not generation.shadows or generation.shadow_for(context.tenant) is None:
            return None
        return Shadowing(self) if random.random() < self._sample else None

    def offer(self, course: Course, slots: list[Slots] | None) -> None:
        """Have it judged; None: it was too large to be kept."""
        if slots is None or len(self._waiting) >= self._most:
            self._metrics.shadow_dropped("size" if slots is None else "queue")
            return
        self._waiting.append(_Job(course, slots))
        if self._working is None:
            self._working = asyncio.ensure_future(self._work())

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._compare(self._waiting.popleft())
        finally:
            self._working = None

    async def _compare(self, job: _Job) -> None:
        course, tenant = job.course, job.course.context.tenant
        with self._policies.generation() as generation:
            guard = generation.shadow_for(tenant)
            if guard is None or generation.guard_for(tenant).policy.label != course.policy.label:
                return  # of policies that are not in force any more
            try:
                screening = await self._judged(guard, job)
            except ServingError:
                self._metrics.shadow("error")
            except Exception:  # the edge of a candidate's engines: it must not end the work on others
                self._metrics.shadow("error")
                logger.exception("shadow policy %s failed", guard.policy.label)
            else:
                self._count(course, screening)

    async def _judged(self, guard: Guard, job: _Job) -> Screening:
        screening = Screening(guard, self._silent, job.course.context, self._cache)
        try:
            for slots in job.slots:
                await screening.screen_texts(job.course.direction, slots)
                await asyncio.sleep(0)  # others first
        except Blocked:
            pass
        return screening

    def _count(self, course: Course, screening: Screening) -> None:
        action = screening.actions[course.direction]
        by = _STRICT.index(action) - _STRICT.index(course.action)
        self._metrics.shadow("same" if not by else "stricter" if by > 0 else "laxer")
        live = {finding.family for verdict in course.verdicts for finding in verdict.findings}
        shadow = {f.family for verdict in screening.verdicts[course.direction] for f in verdict.findings}
        for family in shadow - live:
            self._metrics.shadow_family(family, "added")
        for family in live - shadow:
            self._metrics.shadow_family(family, "missed")
        if by:
            told = screening.guard.policy.label, action, course.policy.label, course.action
            logger.info("shadow %s: %s; %s: %s; %s of %s", *told, course.direction, course.context.request_id)


class Shadowing:
    """One request's texts, kept for the candidate."""

    hears, keeps = False, True

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow
        self._kept: dict[Direction, list[Slots]] = {"prompt": [], "answer": []}
        self._chars: dict[Direction, int] = {"prompt": 0, "answer": 0}

    def content(self, direction: Direction, data: bytes) -> None:
        """Of no use here."""

    def slots(self, direction: Direction, slots: Slots, rulings: Sequence[Ruling]) -> None:
        """Texts that the policy in force judges."""
        self._chars[direction] += sum(len(slot.text) for slot in slots.items)
        if self._chars[direction] <= MOST_CHARS:
            self._kept[direction].append(slots)
        else:
            self._kept[direction].clear()

    async def ended(self, course: Course) -> None:
        """Compare, where there is a verdict to compare with and a text it was on."""
        if course.outcome in ("error", "client_gone") or not self._chars[course.direction]:
            return
        kept = self._kept[course.direction]
        self._shadow.offer(course, kept if self._chars[course.direction] <= MOST_CHARS else None)

    def left(self) -> None:
        """The request is over."""
