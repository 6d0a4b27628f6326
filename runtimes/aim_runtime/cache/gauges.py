"""What ``/metrics`` says of the cache, in a server whose model is a cache's."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.index import Cache
from aim_runtime.cache.stats import read_stats

_STALE_S = 60.0


@dataclass(frozen=True, slots=True)
class _Volume:
    """The volume at one moment, of all processes that share it; of several volumes all, and the least room."""

    entries: int
    size_bytes: int
    free_bytes: int
    hit_rate: float | None


class CacheGauges(Collector):
    """Families ``aim_cache_*``. What this process did is counted; the volumes are read behind, once a minute at most:
    one that hangs does not hold a scrape up.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._hits = self._misses = self._fetched_bytes = self._saved_bytes = 0
        self._caches: dict[Path, Cache] = {}
        self._volume: _Volume | None = None
        self._read_at = -_STALE_S
        self._reading = threading.Lock()
        registry.register(self)

    def used(self, cache: Cache, *, hit: bool, fetched_bytes: int, saved_bytes: int) -> None:
        """A model of ``cache`` is served.

        hit: it was here. fetched_bytes, saved_bytes: what its start fetched, and need not fetch.
        """
        self._hits += hit
        self._misses += not hit
        self._fetched_bytes += fetched_bytes
        self._saved_bytes += saved_bytes
        self._caches[cache.root] = cache
        self._refresh()

    def _refresh(self) -> None:
        with contextlib.suppress(CacheError, OSError):
            caches = list(self._caches.values())
            entries = [entry for cache in caches for entry in cache.entries()]
            counted = [read_stats(cache) for cache in caches]
            asked = sum(known.hits + known.misses for known in counted)
            self._volume = _Volume(
                len(entries),
                sum(entry.size_bytes for entry in entries),
                min(shutil.disk_usage(cache.root).free for cache in caches),
                sum(known.hits for known in counted) / asked if asked else None,
            )
        self._read_at = time.monotonic()

    def _behind(self) -> None:
        try:
            self._refresh()
        finally:
            self._reading.release()

    def describe(self) -> Iterator[Metric]:
        yield from self._own()
        yield from _of(_Volume(0, 0, 0, 0.0))

    def collect(self) -> Iterator[Metric]:
        if time.monotonic() - self._read_at >= _STALE_S and self._reading.acquire(blocking=False):
            threading.Thread(target=self._behind, name="cache-gauges", daemon=True).start()
        yield from self._own()
        if self._volume is not None:
            yield from _of(self._volume)

    def _own(self) -> Iterator[Metric]:
        lookups = CounterMetricFamily(
            "aim_cache_lookups", "Models asked of the cache: hit, or miss and fetched", labels=("result",)
        )
        lookups.add_metric(("hit",), float(self._hits))
        lookups.add_metric(("miss",), float(self._misses))
        yield lookups
        yield CounterMetricFamily("aim_cache_fetched_bytes", "Bytes fetched at the start", value=self._fetched_bytes)
        yield CounterMetricFamily("aim_cache_saved_bytes", "Bytes not fetched: they were here", value=self._saved_bytes)


def _of(volume: _Volume) -> Iterator[Metric]:
    yield GaugeMetricFamily("aim_cache_entries", "Models on the volume", value=volume.entries)
    yield GaugeMetricFamily("aim_cache_size_bytes", "What they take", value=volume.size_bytes)
    yield GaugeMetricFamily("aim_cache_free_bytes", "What is free on the volume", value=volume.free_bytes)
    if volume.hit_rate is not None:
        yield GaugeMetricFamily("aim_cache_hit_ratio", "Share of hits, of all on the volume", value=volume.hit_rate)
