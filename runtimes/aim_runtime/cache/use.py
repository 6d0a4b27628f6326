"""A server's side of the cache: a model found by its source or id, and held for as long as the process lives."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from aim_runtime.cache.add import Options, Watching, add
from aim_runtime.cache.errors import CacheError, Missing
from aim_runtime.cache.gauges import CacheGauges
from aim_runtime.cache.index import Cache, Entry
from aim_runtime.cache.locks import Lease
from aim_runtime.cache.stats import count
from aim_runtime.cache.uri import parse_uri

#: For the life of the process, as the engine's files are open for it.
_HELD: list[Lease] = []
#: Entry → what this process fetched for it.
_FETCHED_BYTES: dict[str, int] = {}


@lru_cache(1)
def _gauges() -> CacheGauges:
    """One for the process, made with the first model of a cache."""
    return CacheGauges()


def cached(root: Path, wanted: str) -> Path:
    """The directory of the model of that source (``hf://org/name`` …). Nothing but the volume is looked at.

    Raises:
        Missing: it is not here; says what fetches it.
        CacheError: that is no source.
        OSError: the volume cannot be read.
    """
    uri = parse_uri(wanted)
    cache = Cache(root)
    entry = cache.find(uri.text)
    if entry is None:
        damaged = any(known.state == "damaged" and known.source == uri.text for known in cache.entries())
        why = "damaged" if damaged else "not"
        broken = "".join(f" ({said})" for said in list(cache.unreadable().values())[:1])
        raise Missing(
            f"{uri.text} is {why} in the cache {root}: aim-runtime cache add {uri.text} --cache {root}{broken}"
        )
    return cache.content(entry.key)


def fetched(root: Path, wanted: str, watching: Watching) -> Path:
    """The same, fetched first if it is not here. Raises CacheError, OSError."""
    uri = parse_uri(wanted)
    cache = Cache(root)
    entry = cache.find(uri.text)
    if entry is None:
        added = add(cache, uri, Options(), watching)
        entry = added.entry
        _FETCHED_BYTES[entry.key] = added.fetched_bytes
    return cache.content(entry.key)


def entry_at(directory: Path) -> tuple[Cache, Entry] | None:
    """The entry whose content ``directory`` is (by a link, or not), if it is one. Raises CacheError, OSError."""
    place = directory.resolve()
    for parent in (place, *place.parents):
        if parent.parent.name == "content" and parent.parent.parent.name == ".aim-cache":
            cache = Cache(parent.parent.parent.parent)
            return next(((cache, entry) for entry in cache.entries() if entry.key == parent.name), None)
    return None


def hold(directory: Path) -> Entry | None:
    """Keep the entry at ``directory`` from being pruned while this process lives, and count that it was of use.

    Returns None where ``directory`` is no cache's.

    Raises:
        CacheError: it is being removed now, is damaged, or the volume has no locks.
    """
    found = entry_at(directory)
    if found is None:
        return None
    cache, entry = found
    _HELD.append(Lease(cache.lease(entry.key)))
    if not cache.is_whole(entry) or not directory.exists():
        raise CacheError(
            f"{entry.name}: is not whole in the cache: aim-runtime cache add {entry.source} --cache {cache.root}"
        )
    cache.touch(entry)
    new = entry.key in _FETCHED_BYTES
    if not new:
        count(cache, hits=1, saved_bytes=entry.size_bytes)
    fetched_bytes = _FETCHED_BYTES.get(entry.key, 0)
    saved_bytes = max(0, entry.size_bytes - fetched_bytes)
    _gauges().used(cache, hit=not new, fetched_bytes=fetched_bytes, saved_bytes=saved_bytes)
    return entry
