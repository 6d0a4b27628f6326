"""Who runs out of memory is told before the kernel's killer tells them: use is read every second, a crossing is one
log line and a metric, and from the hard limit on new requests are refused.

Reading is a thread's of its own: a driver that hangs in a read must not hold the event loop. What has not been read
for STALE_S is unknown, and unknown refuses nobody. Where the figures come from: :mod:`aim_runtime.memory_pools`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from aim_kserve.errors import Unavailable
from aim_profile.units import GIB
from aim_runtime.memory_pools import Pool, Use

logger = logging.getLogger("aim.memory")

INTERVAL_S = 1.0
STALE_S = 10.0
RETRY_S = 5.0
LABELS = ("scope", "card", "partition")


class Level(IntEnum):
    FINE = 0
    HIGH = 1
    FULL = 2


def next_level(now: Level, share: float, pool: Pool) -> Level:
    """The level that ``share`` (used of total) leads to: up at a bound, down only ``pool.slack`` below it."""
    bounds = {Level.HIGH: pool.high_at, Level.FULL: pool.stop_at}
    held = [
        level
        for level, bound in bounds.items()
        if bound is not None and share >= (bound - pool.slack if now >= level else bound)
    ]
    return max(held, default=Level.FINE)


@dataclass(slots=True)
class _Watched:
    pool: Pool
    level: Level = Level.FINE
    use: Use | None = None
    read_at: float = 0.0  # time.monotonic()
    failed: bool = False


class MemoryWatch:
    """Reads pools of memory, tells of crossings, and knows who is full.

    ``with watch:`` (or ``start``/``stop``) reads in the background; :meth:`read` is one pass.

    Args:
        registry: where ``/metrics`` looks; one watch per registry.
        clock: seconds, monotonic.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._watched: dict[Pool, _Watched] = {}
        registry.register(_MemoryGauges(self))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, pool: Pool) -> None:
        """Read ``pool`` from now on; known at once, so that a model is not admitted into full memory."""
        watched = _Watched(pool)
        with self._lock:
            self._watched[pool] = watched
        self._look(watched)

    def discard(self, pool: Pool) -> None:
        """The pool is nobody's any more; unknown ones are ignored."""
        with self._lock:
            self._watched.pop(pool, None)

    def gate(self, pools: Iterable[Pool], own: Pool | None = None) -> Gate:
        """Who asks before it admits a request: full where one of ``pools`` is, or one that all share, or ``own``, which
        is added, and goes when the gate is closed."""
        if own is None:
            return Gate(self, frozenset(pools))
        self.add(own)
        return Gate(self, frozenset((*pools, own)), own)

    def full(self, pools: frozenset[Pool]) -> tuple[Pool, Use] | None:
        """The pool that refuses requests, of ``pools`` and of those that all share."""
        oldest = self._clock() - STALE_S
        # A copy, not the lock: requests ask here, and the watch's thread may come in between.
        for pool, watched in list(self._watched.items()):
            is_ours = pool.shared or pool in pools
            if is_ours and watched.level is Level.FULL and watched.use and watched.read_at >= oldest:
                return pool, watched.use
        return None

    def known(self) -> list[tuple[Pool, Use, Level]]:
        """What was read last and is not stale."""
        oldest = self._clock() - STALE_S
        with self._lock:
            watched = list(self._watched.values())
        return [(item.pool, item.use, item.level) for item in watched if item.use and item.read_at >= oldest]

    def read(self) -> None:
        """One pass over all pools. Blocks as long as the kernel does."""
        with self._lock:
            watched = list(self._watched.values())
        for item in watched:
            self._look(item)

    def start(self, interval_s: float = INTERVAL_S) -> None:
        """Read every ``interval_s`` until :meth:`stop`."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(interval_s,), name="memory-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No further pass; one that hangs in the kernel is left behind."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=1)

    def __enter__(self) -> MemoryWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            self.read()

    def _look(self, watched: _Watched) -> None:
        try:
            use = watched.pool.read()
        except Exception:  # process edge: the thread must outlive whatever a driver says
            if not watched.failed:
                logger.exception("memory of %s cannot be read: it is not watched until it can", watched.pool.name)
            watched.failed = True
            return
        watched.failed = False
        if use is not None and use.total <= 0:
            use = None  # a limit of nothing: no share can be said
        watched.use, watched.read_at = use, self._clock()
        if use is None:
            return
        level = next_level(watched.level, use.share, watched.pool)
        if level is not watched.level:
            _tell(watched.pool, use, watched.level, level)
        watched.level = level


def _tell(pool: Pool, use: Use, before: Level, now: Level) -> None:
    says = f"memory of {pool.name}: {use.text} used ({use.share:.0%})"
    if now is Level.FULL:
        logger.error("%s: new requests are refused until less than %s is", says, _bound(pool, use))
    elif before is Level.FULL:
        logger.warning("%s: requests are admitted again", says)
    elif now is Level.HIGH:
        stop = f"; new requests are refused from {pool.stop_at:.0%} on" if pool.stop_at is not None else ""
        logger.warning("%s%s", says, stop)
    else:
        logger.info("%s: below %.0f %% again", says, 100 * (pool.high_at - pool.slack))


def _bound(pool: Pool, use: Use) -> str:
    return f"{((pool.stop_at or 1) - pool.slack) * use.total / GIB:.2f} GiB"


class Gate:
    """Asked before a request is admitted to one model. A look at a few values: no reading."""

    def __init__(self, watch: MemoryWatch, pools: frozenset[Pool], own: Pool | None = None) -> None:
        self._watch = watch
        self._pools = pools
        self._own = own

    def refusal(self) -> Unavailable | None:
        """Why no request may come in now; None if one may."""
        full = self._watch.full(self._pools)
        if full is None:
            return None
        pool, use = full
        return Unavailable(
            f"memory of {pool.name} is full: {use.text} used, and no request is admitted until less than "
            f"{_bound(pool, use)} is: ask again, or another replica",
            code="memory_full",
            retry_after_s=RETRY_S,
        )

    def close(self) -> None:
        """The model has left."""
        if self._own is not None:
            self._watch.discard(self._own)


class _MemoryGauges(Collector):
    """What was read last; a scrape reads nothing itself."""

    _FAMILIES = (
        ("aim_memory_used_bytes", "Memory in use, by scope: card (all its partitions), partition, cgroup, machine"),
        ("aim_memory_total_bytes", "Memory that there is"),
        ("aim_memory_limit_bytes", "Use from which on new requests are refused"),
        ("aim_memory_admission_stopped", "1 while new requests are refused because of it"),
    )

    def __init__(self, watch: MemoryWatch) -> None:
        self._watch = watch

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Names only."""
        return iter([GaugeMetricFamily(name, text) for name, text in self._FAMILIES])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        rows = [
            (pool.labels, (use.used, use.total, *_limits(pool, use, level))) for pool, use, level in self._watch.known()
        ]
        for index, (name, text) in enumerate(self._FAMILIES):
            family = GaugeMetricFamily(name, text, labels=LABELS)
            for labels, values in rows:
                value = values[index]
                if value is not None:
                    family.add_metric(labels, value)
            if family.samples:
                yield family


def _limits(pool: Pool, use: Use, level: Level) -> tuple[float, int] | tuple[None, None]:
    return (None, None) if pool.stop_at is None else (pool.stop_at * use.total, int(level is Level.FULL))
