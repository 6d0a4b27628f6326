"""Verdicts that replicas share, in Redis. It may be slow, away or wrong: a request waits for 5 ms and asks itself then.

Keys are digests, values findings (labels, spans, scores): no text. Whoever may write there decides what passes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import orjson

from aim_guardrail.detectors.base import Finding
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.breaker import Breaker

logger = logging.getLogger("aim.guardrail")

Found = tuple[Finding, ...]
T = TypeVar("T")

TIMEOUT_S = 0.005
#: How long a call may take in the background: connections are made there, and one that waits is not begun anew.
CALL_S = 1.0
MOST_CALLS = 32
_PREFIX = b"aim:guardrail:1:"


class SharedCache:
    """Args: ``url``: ``redis://``, ``rediss://`` or ``unix://``, as redis-py reads it. Connects when it is first asked.

    Raises:
        ValueError: the URL cannot be read.
    """

    def __init__(self, url: str) -> None:
        # Imported here: whoever has no Redis needs no client.
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        self._redis = Redis.from_url(
            url,
            socket_timeout=CALL_S,
            socket_connect_timeout=CALL_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=MOST_CALLS,
        )
        self._breaker = Breaker()
        self._calls: set[asyncio.Task[Any]] = set()

    async def get(self, keys: Sequence[bytes], metrics: Metrics) -> dict[bytes, Found]:
        """What is known of these, by now."""
        call = self._begin(self._got(keys))
        if call is not None:
            await asyncio.wait([call], timeout=TIMEOUT_S)
        if call is None or not call.done() or call.cancelled() or call.exception() is not None:
            metrics.cached("l2", "error", len(keys))
            return {}
        return _read(keys, call.result(), metrics)

    def put(self, found: Mapping[bytes, Found], ttl_s: int) -> None:
        """Have these remembered, in the background, if that goes well."""
        if found:
            pipe = self._redis.pipeline(transaction=False)
            for key, findings in found.items():
                pipe.set(_PREFIX + key, _written(key, findings), ex=ttl_s)
            self._begin(pipe.execute())

    async def close(self) -> None:
        """End what is in flight."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self._redis.aclose()

    async def _got(self, keys: Sequence[bytes]) -> Sequence[object]:
        values: Sequence[object] = await self._redis.mget([_PREFIX + key for key in keys])
        return values

    def _begin(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T] | None:
        """Its task, unless Redis is left alone or has as many calls to answer as it may."""
        if len(self._calls) >= MOST_CALLS or not self._breaker.allows():
            call.close()
            return None
        self._breaker.begin()
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if task.cancelled():
            self._breaker.gave_up()
        elif (error := task.exception()) is None:
            self._breaker.succeeded()
        else:
            was_open = self._breaker.is_open
            self._breaker.failed()
            if self._breaker.is_open and not was_open:
                logger.warning("Redis shares no verdicts (%s): each replica remembers its own", type(error).__name__)


def _written(key: bytes, findings: Found) -> bytes:
    """The key goes first: an answer to another question is known as one."""
    return key + orjson.dumps([[f.family, f.label, f.start, f.end, f.score, f.rule_id] for f in findings])


def _read(keys: Sequence[bytes], values: Sequence[object], metrics: Metrics) -> dict[bytes, Found]:
    found = {}
    for key, value in zip(keys, values, strict=True):
        findings = None if value is None else _findings(key, value)
        if findings is not None:
            found[key] = findings
        metrics.cached("l2", "hit" if findings is not None else "miss" if value is None else "error")
    return found


def _findings(key: bytes, value: object) -> Found | None:
    """None: what stands there is not ours."""
    if not isinstance(value, bytes) or not value.startswith(key):
        return None
    try:
        return tuple(_finding(*fields) for fields in orjson.loads(value[len(key) :]))
    except (orjson.JSONDecodeError, TypeError, ValueError):
        return None


def _finding(family: object, label: object, start: object, end: object, score: object, rule_id: object) -> Finding:
    if not (isinstance(family, str) and isinstance(label, str) and isinstance(rule_id, str)):
        raise TypeError
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(score, int | float)):
        raise TypeError
    if not (0 <= start <= end and 0 <= score <= 1):
        raise ValueError
    return Finding(family, label, start, end, float(score), rule_id)
