"""Whether what is on the disk is what was fetched: all bytes again, or only the sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from aim_runtime.cache.add import Watching
from aim_runtime.cache.errors import Busy
from aim_runtime.cache.index import Cache, CachedFile, Entry
from aim_runtime.cache.locks import Lease, exclusive

_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Verified:
    """``bad``: path → what is wrong with it; empty: the entry is as it was fetched."""

    entry: Entry
    bad: dict[str, str]


def verify(
    cache: Cache,
    entries: Iterable[Entry],
    *,
    quick: bool,
    at_once: int = 4,
    wait_s: float = 60,
    watching: Watching | None = None,
) -> list[Verified]:
    """Look at each. A damaged one is not found by any server from now on; one that is whole again is.

    quick: sizes only. Raises CacheError, OSError: leases or the index cannot be written to.
    """
    watching = watching or Watching()
    found = []
    with ThreadPoolExecutor(at_once, thread_name_prefix="verify") as pool:
        for entry in entries:
            if entry.state == "publishing" or cache.entry(entry.key) is None:  # being fetched, or pruned since
                continue
            try:
                lease = Lease(cache.lease(entry.key))
            except Busy:  # being pruned
                continue
            watching.begins(entry.name, entry.size_bytes)
            try:
                place = cache.content(entry.key)
                seen = pool.map(lambda file, place=place: _wrong(place, file, quick, watching), entry.files)
                bad = {file.path: wrong for file, wrong in zip(entry.files, seen, strict=True) if wrong}
            finally:
                lease.release()
                watching.ends()
            if (now := _recorded(cache, entry, bad, wait_s, quick=quick)) is not None:
                found.append(Verified(now, bad))
    return found


def _wrong(place: Path, file: CachedFile, quick: bool, watching: Watching) -> str:
    """Empty: nothing is."""
    path = place / file.path
    try:
        size = path.stat().st_size
        if size != file.size:
            return f"{size} bytes, {file.size} were fetched"
        if quick:
            watching.advances(file.path, size)
            return ""
        digest = hashlib.sha256()
        with path.open("rb") as opened:
            while data := opened.read(_CHUNK_BYTES):
                digest.update(data)
                watching.advances(file.path, len(data))
    except OSError as error:
        return error.strerror or str(error)
    return "" if digest.hexdigest() == file.sha256 else f"sha256 is {digest.hexdigest()}, not {file.sha256}"


def _recorded(cache: Cache, entry: Entry, bad: dict[str, str], wait_s: float, *, quick: bool) -> Entry | None:
    """A look at sizes finds damage, it does not clear what a look at all bytes found. None: meanwhile it was pruned, or
    fetched anew: what was seen is not true of what is here now.
    """
    whole_again = entry.state == "damaged" and not bad and not quick
    if not bad and not whole_again:
        return entry
    with exclusive(cache.lock(entry.name), wait_s):
        known = cache.entry(entry.key)
        if known is None or known.model_copy(update={"pinned": entry.pinned}) != entry:
            return None
        update = {"state": "complete" if whole_again else "damaged", "bad": tuple(sorted(bad))}
        entry = known.model_copy(update=update)
        cache.write(entry)
        if bad:
            cache.unlink(entry)
        elif not cache.link(entry.name).exists():
            cache.make_current(entry)
    return entry
