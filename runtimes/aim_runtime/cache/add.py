"""A model from its source into the cache: listed, chosen, fetched, verified, published; or found to be here."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aim_runtime.cache.errors import CacheError, Changed, Transient
from aim_runtime.cache.fetch import Effort, Fetch, Tally, check_space, missing_bytes
from aim_runtime.cache.index import Cache, CachedFile, Entry, now, slug
from aim_runtime.cache.locks import exclusive
from aim_runtime.cache.selection import select
from aim_runtime.cache.source import Listing, RemoteFile, Source
from aim_runtime.cache.sources import open_source
from aim_runtime.cache.stats import count
from aim_runtime.cache.uri import ModelUri, checked_name

_LISTINGS, _PAUSE_S = 3, 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """name: the id; default: the source's. wait_s: how long another process may hold the name. stall_s: how long a
    connection may be silent. pin: None leaves it as it is.
    """

    name: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    pin: bool | None = None
    wait_s: float = 3600.0
    stall_s: float = 60.0
    effort: Effort = field(default_factory=Effort)


class Watching:
    """Who watches; this one does not. ``begins`` is told how many bytes are to come in all."""

    def begins(self, name: str, total_bytes: int) -> None: ...
    def advances(self, path: str, count: int) -> None: ...
    def says(self, text: str) -> None: ...
    def ends(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Added:
    """hit: nothing had to be fetched. fetched_bytes came over the network; reused_bytes were here already."""

    entry: Entry
    hit: bool
    fetched_bytes: int
    reused_bytes: int


def add(cache: Cache, uri: ModelUri, options: Options, watching: Watching | None = None) -> Added:
    """Have ``uri`` in the cache as it is now at its source. Two processes: the second waits, and finds it.

    Raises:
        CacheError: one line; what has been fetched stays, and another call goes on with it.
        OSError: the volume cannot be written to.
    """
    watching = watching or Watching()
    name = checked_name(options.name or uri.name)
    cache.check_free(name)
    waiting = lambda who: watching.says(f"{name}: waiting for {who}, who fetches it")  # noqa: E731
    with exclusive(cache.lock(name), options.wait_s, waiting):
        cache.recover(name)
        source = open_source(uri, options.stall_s)
        for attempt in range(_LISTINGS):
            try:
                return _Adding(cache, uri, name, options, watching).once(source)
            except Changed as error:
                if attempt + 1 == _LISTINGS:
                    raise CacheError(f"{error} (three times)") from error
                watching.says(f"{error}: listed again")
    raise AssertionError


def present(cache: Cache, uri: ModelUri, options: Options) -> Added | None:
    """The entry of ``uri``, if it is here: no network is asked. Raises CacheError, OSError."""
    entry = cache.find(uri.text)
    if entry is None or options.name not in (None, entry.name):
        return None
    if options.pin not in (None, entry.pinned) or not cache.is_current(entry):  # else a volume may be read only
        with exclusive(cache.lock(entry.name), options.wait_s):
            entry = cache.entry(entry.key)
            if entry is None or not cache.is_whole(entry):  # pruned while this waited
                return None
            entry = _pinned(cache, entry, options.pin)
            cache.make_current(entry)
    count(cache, hits=1, saved_bytes=entry.size_bytes)
    return Added(entry, True, 0, entry.size_bytes)


def _pinned(cache: Cache, entry: Entry, pin: bool | None) -> Entry:
    if pin is None or entry.pinned == pin:
        return entry
    entry = entry.model_copy(update={"pinned": pin})
    cache.write(entry)
    return entry


@dataclass
class _Adding:
    cache: Cache
    uri: ModelUri
    name: str
    options: Options
    watching: Watching

    def once(self, source: Source) -> Added:
        listing = _listed(source, self.options.effort, self.watching)
        files = select(listing.files, self.options.include, self.options.exclude, self.uri.text)
        listed = _digest_of([[file.path, file.size, file.digest, file.validator] for file in files])
        same = [entry for entry in self._mine() if entry.listed == listed and entry.source == self.uri.text]
        if same and all(file.resumable for file in files):
            entry = _pinned(self.cache, same[-1], self.options.pin)
            self.cache.make_current(entry)
            count(self.cache, hits=1, saved_bytes=entry.size_bytes)
            return Added(entry, True, 0, entry.size_bytes)
        tally = Tally(self.watching.advances)
        try:
            records = self._fetched(source, files, tally)
        finally:
            count(self.cache, fetched_bytes=tally.fetched, saved_bytes=tally.reused if tally.fetched else 0)
        entry = self._published(listing, listed, records)
        count(self.cache, misses=1)
        return Added(entry, False, tally.fetched, tally.reused)

    def _mine(self) -> list[Entry]:
        return [entry for entry in self.cache.entries() if entry.name == self.name and self.cache.is_whole(entry)]

    def _fetched(self, source: Source, files: Sequence[RemoteFile], tally: Tally) -> list[CachedFile]:
        directory = self.cache.partial(self.name)
        directory.mkdir(parents=True, exist_ok=True)
        _drop_others(directory / "files", {file.path for file in files})
        check_space(directory, missing_bytes(directory, files), self.uri.text)
        self.watching.begins(self.name, sum(file.size for file in files))
        try:
            return Fetch(source, directory, self.options.effort, tally, self._known(files)).all(files)
        finally:
            self.watching.ends()

    def _known(self, files: Sequence[RemoteFile]) -> dict[str, Path]:
        """SHA-256 → a file of an entry: shards that two revisions share are copied, not fetched."""
        wanted = {file.digest[1] for file in files if file.digest is not None}
        entries = [entry for entry in self.cache.entries() if entry.state != "publishing"]
        return {
            file.sha256: self.cache.content(entry.key) / file.path
            for entry in entries
            for file in entry.files
            if file.sha256 in wanted and file.path not in entry.bad
        }

    def _published(self, listing: Listing, listed: str, records: Sequence[CachedFile]) -> Entry:
        tree = _digest_of([self.name, self.uri.text, listing.revision, [[file.path, file.sha256] for file in records]])
        key = f"{slug(self.name)}@{tree[:16]}"
        known = self.cache.entry(key)
        pinned = self.options.pin if self.options.pin is not None else bool(known and known.pinned)
        entry = Entry(
            key=key,
            name=self.name,
            source=self.uri.text,
            revision=listing.revision,
            listed=listed,
            files=tuple(records),
            fetched_at=now(),
            state="publishing",
            pinned=pinned,
        )
        directory = self.cache.partial(self.name)
        if known is not None and self.cache.is_whole(known):  # the very same, perhaps served now: it stays where it is
            self.cache.write(entry.model_copy(update={"state": "complete"}))
            self.cache.make_current(entry)
        else:
            self.cache.publish(entry, directory / "files")
        shutil.rmtree(directory, ignore_errors=True)
        return entry.model_copy(update={"state": "complete"})


def _listed(source: Source, effort: Effort, watching: Watching) -> Listing:
    for attempt in range(effort.retries + 1):
        try:
            return source.listing()
        except Transient as error:
            if attempt == effort.retries:
                raise CacheError(f"{error} (given up after {attempt + 1} attempts)") from error
            watching.says(f"{error}: tried again")
            time.sleep(min(30.0, _PAUSE_S * 2**attempt) * random.uniform(0.5, 1))
    raise AssertionError


def _drop_others(directory: Path, wanted: set[str]) -> None:
    """What an earlier attempt fetched of files that are not wanted any more."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(directory).as_posix() not in wanted:
            path.unlink()


def _digest_of(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
