"""Making room: least recently used first, never what a server uses or somebody pinned."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aim_kserve.durable import TEMPORARY
from aim_runtime.cache.errors import Busy
from aim_runtime.cache.index import OWN, Cache, Entry, now
from aim_runtime.cache.locks import exclusive, unused

_LONG_S = 60.0
Why = Literal["age", "size", "abandoned", "left behind"]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or with ``dry_run`` would be. ``name``: an entry's key, or a path below the cache."""

    name: str
    size_bytes: int
    why: Why


@dataclass(frozen=True, slots=True)
class Outcome:
    """``kept``: entries that would have gone, but are in use or pinned → which. ``size_bytes``: what is left."""

    pruned: tuple[Pruned, ...]
    kept: dict[str, Literal["in use", "pinned"]]
    size_bytes: int


def prune(cache: Cache, *, max_size_bytes: int | None, max_age_s: float | None, dry_run: bool = False) -> Outcome:
    """Remove entries not used for ``max_age_s``, then the least recently used until ``max_size_bytes`` hold the rest;
    also fetches that nobody went on with for ``max_age_s``, and what killed processes left behind.

    Raises:
        CacheError: the volume has no locks: what is in use cannot be told.
        OSError: it cannot be written to.
    """
    size = size_bytes(cache)
    pruned: list[Pruned] = []
    kept: dict[str, Literal["in use", "pinned"]] = {}
    for gone in _remains(cache, max_age_s, dry_run):
        pruned.append(gone)
        size -= gone.size_bytes
    for entry in sorted(cache.entries(), key=cache.last_used):
        old = max_age_s is not None and now() - cache.last_used(entry) > max_age_s
        if not old and (max_size_bytes is None or size <= max_size_bytes):
            continue
        if entry.pinned:
            kept[entry.key] = "pinned"
        elif not _removed(cache, entry, dry_run):
            kept[entry.key] = "in use"
        else:
            pruned.append(Pruned(entry.key, entry.size_bytes, "age" if old else "size"))
            size -= entry.size_bytes
    return Outcome(tuple(pruned), kept, size)


def _removed(cache: Cache, entry: Entry, dry_run: bool) -> bool:
    """False: somebody uses it, or changes it now."""
    with contextlib.suppress(Busy), exclusive(cache.lock(entry.name), 0), unused(cache.lease(entry.key)) as free:
        if free and not dry_run:
            cache.unlink(entry)
            cache.forget(entry.key)
            with contextlib.suppress(FileNotFoundError):
                cache.discard(cache.content(entry.key))
            cache.lease(entry.key).unlink(missing_ok=True)
        return free
    return False


def _remains(cache: Cache, max_age_s: float | None, dry_run: bool) -> Iterator[Pruned]:
    """Fetches that were given up; content without an entry; what was on its way off the disk."""
    keys = cache.keys()
    if not dry_run:
        _sweep_temporaries(cache)
    for path in _below(cache.own / "trash"):  # nobody looks there: two who remove it harm nothing
        yield _removed_tree(path, "left behind", dry_run)
    for path in [path for path in _below(cache.own / "content") if path.name not in keys]:
        yield from _gone(cache, path, path.name.partition("@")[0], "left behind", dry_run)
    for path in _below(cache.own / "partial"):
        if max_age_s is not None and now() - _changed(path) > max_age_s:
            yield from _gone(cache, path, path.name, "abandoned", dry_run)


def _gone(cache: Cache, path: Path, lock: str, why: Why, dry_run: bool) -> Iterator[Pruned]:
    with contextlib.suppress(Busy), exclusive(cache.own / "locks" / lock, 0):
        if (
            why == "left behind"
            and path.parent.name == "content"
            and (cache.own / "entries" / f"{path.name}.json").exists()
        ):
            return  # published since
        yield _removed_tree(path, why, dry_run)


def _removed_tree(path: Path, why: Why, dry_run: bool) -> Pruned:
    size = _size(path)
    if not dry_run:
        shutil.rmtree(path, ignore_errors=True)
    return Pruned(f"{OWN}/{path.parent.name}/{path.name}", size, why)


def _sweep_temporaries(cache: Cache) -> None:
    """What processes that were killed while they wrote an index file or a link left: a minute is long for either."""
    folders = {cache.root, cache.own, cache.own / "entries", *(cache.link(e.name).parent for e in cache.entries())}
    for folder in folders | {path for path in _below(cache.root) if path.is_dir() and not path.is_symlink()}:
        for path in folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if TEMPORARY.fullmatch(path.name) and now() - path.lstat().st_mtime > _LONG_S:
                    path.unlink()


def _below(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _changed(path: Path) -> float:
    return max((status.st_mtime for status in _all(path)), default=0.0)


def _size(path: Path) -> int:
    return sum(status.st_size for status in _all(path) if stat.S_ISREG(status.st_mode))


def _all(path: Path) -> Iterator[os.stat_result]:
    """Of ``path`` and all below it that is still there when it is looked at: others fetch and remove meanwhile."""
    for folder, _, files in os.walk(path):
        for each in (folder, *(os.path.join(folder, file) for file in files)):
            with contextlib.suppress(FileNotFoundError):
                yield os.lstat(each)


def size_bytes(cache: Cache) -> int:
    """All that the cache holds: entries by their index, and what is on its way or left behind by the disk."""
    keys = {entry.key: entry for entry in cache.entries()}
    other = [path for path in _below(cache.own / "content") if path.name not in keys]
    rest = [*other, *_below(cache.own / "partial"), *_below(cache.own / "trash")]
    return sum(entry.size_bytes for entry in keys.values()) + sum(_size(path) for path in rest)
