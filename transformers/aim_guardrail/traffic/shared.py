"""Counts in Redis, which all replicas share. The only file of this room that knows Redis."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, TypeVar

from aim_guardrail.traffic.windows import Charge, Standing

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger("aim.server")

#: After a failure Redis is left alone for so long: what waits for it waits in vain.
RETRY_AFTER_S = 1.0
_PREFIX = "aim:limit:"
_MOST_CONNECTIONS = 64  # a call takes Redis 50 us: more would only wait there

T = TypeVar("T")


class SharedAway(Exception):
    """Redis did not answer, or not in time."""


class SharedWindows:
    """Counts in one Redis server, by its clock unless ``now_ms`` is given.

    Args:
        url: ``redis://[user:password@]host:port/db``, ``rediss://`` or ``unix://``.
        timeout_s: the longest a call may take, connecting included.

    Attributes:
        failures: calls that were not answered.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        from redis.asyncio import BlockingConnectionPool, Redis  # 60 ms, and only where there is one
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        # No second try: what was not answered may have been counted.
        self._redis: Redis = Redis.from_pool(
            BlockingConnectionPool.from_url(
                url,
                max_connections=_MOST_CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
        )
        self._timeout_s = timeout_s
        self._away_until_s = 0.0
        self.failures = 0
        self._take = self._redis.register_script(_script("take"))
        self._settle = self._redis.register_script(_script("settle"))

    async def take(self, charges: Sequence[Charge], now_ms: int = -1) -> tuple[bool, list[Standing]]:
        """Take all, or nothing.

        Raises:
            SharedAway: nobody knows whether anything was taken.
        """
        arguments = [now_ms]
        for each in charges:
            arguments += [each.limit, each.cost, each.window.width_ms, each.window.buckets]
        answer = await self._ask(lambda: self._take([_PREFIX + each.key for each in charges], arguments))
        figures = [answer[at : at + 4] for at in range(1, len(answer), 4)]
        return bool(answer[0]), [Standing(*each) for each in figures]

    async def settle(self, corrections: Sequence[tuple[Charge, int, int]], now_ms: int = -1) -> None:
        """Correct what was taken: charge, bucket, delta. Raises SharedAway."""
        arguments = [now_ms]
        for charge, bucket, delta in corrections:
            arguments += [bucket, delta, charge.window.width_ms, charge.window.buckets]
        await self._ask(lambda: self._settle([_PREFIX + charge.key for charge, _, _ in corrections], arguments))

    async def close(self) -> None:
        await self._redis.aclose()

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> T:
        from redis.exceptions import RedisError

        if time.monotonic() < self._away_until_s:
            raise SharedAway
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call()
        except (RedisError, OSError, TimeoutError) as error:
            self.failures += 1
            self._away_until_s = time.monotonic() + RETRY_AFTER_S
            logger.warning("Redis does not count: %s (asked again in %g s)", type(error).__name__, RETRY_AFTER_S)
            # What waits in the pool is as dead, and would fail one at a time, long after Redis is back.
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await self._redis.connection_pool.disconnect(inuse_connections=False)
            raise SharedAway from error


def _script(name: str) -> str:
    return (resources.files("aim_guardrail") / "traffic" / f"{name}.lua").read_text(encoding="utf-8")
