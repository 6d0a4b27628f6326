"""Verdicts remembered: what a detector found on a passage, while neither has changed. Never the passage.

Asked again, it costs a look-up; asked twice at the same time, the second waits for the first (single flight). Only for
detectors that say their findings follow from the passage alone; errors and timeouts are never remembered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from hashlib import blake2b

from aim_guardrail.detectors.base import Finding, Passage
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.shared_cache import Found, SharedCache

#: Beyond that, hashing would hold the event loop up, and a text so long hardly comes twice.
MOST_CHARS, MOST_PASSAGES = 2**18, 1024
#: More findings on one passage are not remembered: what is has a bound.
MOST_FINDINGS = 64

Ask = Callable[[Sequence[int]], Awaitable[list[list[Finding]]]]
"""Asks a detector about some of the passages, by their indexes."""


class VerdictCache:
    """For one event loop.

    Args:
        entries: how many findings are held in memory; the one longest not used goes first.
        ttl_s: how long each is, here and shared.
        shared: what replicas hold together, asked about what is not here.
    """

    def __init__(
        self,
        entries: int = 10_000,
        ttl_s: int = 300,
        shared: SharedCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._ttl_s, self._shared, self._clock = entries, ttl_s, shared, clock
        self._held: dict[bytes, tuple[float, Found]] = {}
        self._flights: dict[bytes, asyncio.Future[Found | None]] = {}

    async def found(self, keys: Sequence[bytes], ask: Ask, deadline_s: float, metrics: Metrics) -> list[list[Finding]]:
        """The findings on each passage, by its key (`keys_of`); `ask` is called with those that nobody knows.

        Raises:
            TimeoutError: who else asks about one of them had no answer by ``deadline_s`` (``time.monotonic``).
            Exception: whatever ``ask`` raised.
        """
        places = {key: at for at, key in enumerate(keys)}
        known: dict[bytes, Found] = {}
        while missing := [key for key in places if key not in known]:
            known |= self._here(missing, metrics)
            flying = {key: self._flights[key] for key in missing if key not in known and key in self._flights}
            if mine := [key for key in missing if key not in known and key not in flying]:
                known |= await self._lead(mine, places, ask, metrics)
            known |= await _landed(flying, deadline_s, metrics)
        return [list(known[key]) for key in keys]

    async def close(self) -> None:
        """Close what is shared."""
        if self._shared is not None:
            await self._shared.close()

    def _here(self, keys: Iterable[bytes], metrics: Metrics) -> dict[bytes, Found]:
        now, found = self._clock(), dict[bytes, Found]()
        for key in keys:
            until_s, findings = self._held.pop(key, (0.0, ()))
            if until_s > now:
                self._held[key] = until_s, findings  # used last: goes last
                found[key] = findings
            metrics.cached("l1", "hit" if until_s > now else "miss")
        return found

    async def _lead(
        self, keys: Sequence[bytes], places: dict[bytes, int], ask: Ask, metrics: Metrics
    ) -> dict[bytes, Found]:
        """Find out about these, for others, too. Where that fails, the others are told to ask for themselves."""
        loop = asyncio.get_running_loop()
        self._flights |= {key: loop.create_future() for key in keys}
        found: dict[bytes, Found] = {}
        try:
            if self._shared is not None:
                found |= await self._shared.get(keys, metrics)
                self._hold(found)
            if missing := [key for key in keys if key not in found]:
                answers = await ask([places[key] for key in missing])
                new = {key: tuple(findings) for key, findings in zip(missing, answers, strict=True)}
                found |= new
                self._hold(new)
                if self._shared is not None:
                    self._shared.put({key: f for key, f in new.items() if len(f) <= MOST_FINDINGS}, self._ttl_s)
            return found
        finally:
            for key in keys:
                self._flights.pop(key).set_result(found.get(key))

    def _hold(self, found: dict[bytes, Found]) -> None:
        until_s = self._clock() + self._ttl_s
        for key, findings in found.items():
            if len(findings) <= MOST_FINDINGS:
                self._held.pop(key, None)
                self._held[key] = until_s, findings
        while len(self._held) > self._most:
            del self._held[next(iter(self._held))]


async def _landed(
    flights: dict[bytes, asyncio.Future[Found | None]], deadline_s: float, metrics: Metrics
) -> dict[bytes, Found]:
    """What others found out, once they have; what they did not is not in it."""
    if not flights:
        return {}
    _, late = await asyncio.wait(flights.values(), timeout=max(0.0, deadline_s - time.monotonic()))
    if late:
        raise TimeoutError
    found = {key: findings for key, flight in flights.items() if (findings := flight.result()) is not None}
    for _ in found:
        metrics.cached("flight", "hit")
    return found


def is_small(passages: Sequence[Passage]) -> bool:
    """Whether remembering them costs less than it may."""
    return len(passages) <= MOST_PASSAGES and sum(len(passage.text) for passage in passages) <= MOST_CHARS


def keys_of(scope: Sequence[str], passages: Sequence[Passage]) -> list[bytes]:
    """A key for each passage, 32 bytes: BLAKE2b of all that its findings may depend on. `scope`: what is the same for
    all (rule, detector, tenant); of the passage its text, who says it, what names it and its direction."""
    shared = blake2b(digest_size=32)
    _add(shared, scope)
    keys = []
    for passage in passages:
        own = shared.copy()
        _add(own, (passage.direction, passage.role, passage.key, passage.text))
        keys.append(own.digest())
    return keys


def _add(hashed: blake2b, parts: Iterable[str]) -> None:
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "big") + data)  # so that no two rows of parts are one
