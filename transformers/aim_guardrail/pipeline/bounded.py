"""A batch detector that is asked within bounds: not when its answer would come too late, not while it keeps failing,
never for longer than there is time, and never by more calls than it can leave behind."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Literal, TypeVar

from aim_guardrail.detectors.base import Asked, BatchDetector, Finding, Misconfigured, Passage, Unjudged
from aim_guardrail.detectors.threads import ABANDONED, Busy
from aim_guardrail.pipeline.breaker import Breaker
from aim_guardrail.pipeline.budget import Estimate

logger = logging.getLogger("aim.guardrail")

Found = list[list[Finding]]
T = TypeVar("T")

#: Passages that a detector is asked about at once: whatever it does with each on the event loop is done for no more.
MOST_AT_ONCE = 1024
#: Calls that were given up and run on: with so many a detector is asked no more until one has ended.
MOST_ABANDONED = 8
#: How long a cancelled call may take to end before it counts as one that runs on.
GRACE_S = 0.05
#: The same failure is told once in so many seconds.
TELL_EVERY_S = 60.0


class NotAsked(Exception):
    """Why a detector was not asked at all."""

    def __init__(self, reason: Literal["budget", "breaker"]) -> None:
        super().__init__(reason)
        self.reason = reason


class Bounded:
    """One detector, with what is known of how it answers. For one event loop; shared by all rules that want the same,
    and by the policies that follow.

    Attributes:
        detector: itself.
        breaker: of one that asks elsewhere; None of one that computes here.
        is_cacheable: whether its findings may be remembered: it says so.
    """

    def __init__(self, detector: BatchDetector, name: str) -> None:
        self.detector = detector
        self.breaker = Breaker() if detector.cost == "remote" else None
        self.is_cacheable = bool(getattr(detector, "cacheable", False))  # third parties' may not know the question
        self._estimate = Estimate()
        self._name = name
        self._abandoned: set[asyncio.Task[Found]] = set()
        self._told: dict[str, float] = {}

    async def ask(self, passages: Sequence[Passage], asked: Asked) -> Found:
        """Its findings on each passage, by the deadline.

        Raises:
            NotAsked: and why.
            TimeoutError: it did not answer in time.
            Misconfigured: it says it cannot.
            Exception: whatever it raised, or an answer that is none.
        """
        chars = 0
        async for part in parts(passages):
            chars += sum(len(passage.text) for passage in part)
        left_s = asked.deadline_s - time.monotonic()
        if self.breaker is not None and not self.breaker.allows():
            raise NotAsked("breaker")
        if not self._estimate.allows(chars, left_s):
            raise NotAsked("budget")
        if len(self._abandoned) >= MOST_ABANDONED:
            raise Busy(f"{len(self._abandoned)} calls that were given up still run")
        if self.breaker is None:
            return await self._ask(passages, asked, chars, left_s)
        return await self._ask_breaker(self.breaker, passages, asked, chars, left_s)

    def apart(self) -> Bounded:
        """The same detector, of whom nothing is known."""
        return Bounded(self.detector, self._name)

    async def close(self) -> None:
        """Give back what the detector holds."""
        await self.detector.close()

    async def _ask_breaker(
        self, breaker: Breaker, passages: Sequence[Passage], asked: Asked, chars: int, left_s: float
    ) -> Found:
        breaker.begin()
        try:
            found = await self._ask(passages, asked, chars, left_s)
        except (asyncio.CancelledError, Misconfigured, Unjudged):
            # Misconfigured never passes: it must not be left alone. Nobody's text turns a detector off for others.
            breaker.gave_up()
            raise
        except Exception:  # third parties raise what they like
            breaker.failed()
            raise
        breaker.succeeded()
        return found

    async def _ask(self, passages: Sequence[Passage], asked: Asked, chars: int, left_s: float) -> Found:
        began = time.monotonic()
        found: Found = []
        async for part in parts(passages) if self.is_cacheable else _whole(passages):  # others may look at all together
            found += await self._ask_part(part, asked, chars, began, left_s)
        self._estimate.answered(chars, time.monotonic() - began, left_s)
        return found

    async def _ask_part(self, part: Sequence[Passage], asked: Asked, chars: int, began: float, left_s: float) -> Found:
        """Of a call on `chars` that `began` with `left_s` left, the answer to a part."""
        task = asyncio.ensure_future(self.detector.scan_batch(part, asked))
        try:
            await asyncio.wait([task], timeout=max(0.0, began + left_s - time.monotonic()))
        finally:
            if not task.done():
                self._abandon(task)
        if not task.done():
            self._estimate.timed_out(chars, time.monotonic() - began)
            self._tell("does not answer in its time")
            raise TimeoutError
        return self._answer(task, part)

    def _answer(self, task: asyncio.Task[Found], passages: Sequence[Passage]) -> Found:
        """What it answered, if it is an answer. Raises what it raised."""
        try:
            if task.cancelled():
                raise ValueError("it gave up by itself")
            return _checked(task.result(), passages)
        except Misconfigured as error:
            self._tell(f"is misconfigured: {error}")
            raise
        except Exception as error:  # its words may repeat a text: the kind alone is told
            self._tell(f"fails: {type(error).__name__}")
            raise

    def _abandon(self, task: asyncio.Task[Found]) -> None:
        """Cancel a call. It ends at once as a rule; one that does not is counted until it does."""
        task.cancel()
        task.add_done_callback(_look_at)
        asyncio.get_running_loop().call_later(GRACE_S, self._count, task)

    def _count(self, task: asyncio.Task[Found]) -> None:
        if not task.done():
            self._abandoned.add(task)
            ABANDONED.add(1)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Found]) -> None:
        self._abandoned.discard(task)
        ABANDONED.add(-1)

    def _tell(self, how: str) -> None:
        """Log a failure, not each of a row."""
        now = time.monotonic()
        if now - self._told.get(how, -TELL_EVERY_S) >= TELL_EVERY_S:
            self._told = {kind: told for kind, told in self._told.items() if now - told < TELL_EVERY_S} | {how: now}
            logger.warning("detector %s %s", self._name, how)


async def parts(passages: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    """So many at a time as cost the event loop little; between them others have their turn."""
    for at in range(0, len(passages), MOST_AT_ONCE):
        if at:
            await asyncio.sleep(0)
        yield passages[at : at + MOST_AT_ONCE]


async def _whole(passages: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    yield passages


def _look_at(task: asyncio.Task[Found]) -> None:
    """Whatever a call that was given up raised, nobody waits for it; asyncio would tell of it."""
    if not task.cancelled():
        task.exception()


def _checked(found: Found, passages: Sequence[Passage]) -> Found:
    """An answer whose findings all lie in their passages. Raises ValueError: it is none."""
    if len(found) != len(passages):
        raise ValueError("not as many answers as passages")
    for passage, findings in zip(passages, found, strict=True):
        for finding in findings:
            if not (0 <= finding.start <= finding.end <= len(passage.text) and 0 <= finding.score <= 1):
                raise ValueError("a finding outside its passage, or a score that is none")
    return found
