"""Files from a source onto the volume: several at once, each going on at the byte where an earlier attempt ended."""

from __future__ import annotations

import errno
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aim_profile.units import GIB, gib
from aim_runtime.cache.errors import CacheError, Corrupt, Transient
from aim_runtime.cache.index import CachedFile
from aim_runtime.cache.part import Part
from aim_runtime.cache.source import CHUNK_BYTES, Digests, RemoteFile, Source

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
#: A volume that is full to the last byte cannot even take the index.
_SPARE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Effort:
    """files_at_once; retries: attempts at one file that bring nothing new before it is given up."""

    files_at_once: int = 4
    retries: int = 6


@dataclass
class Tally:
    """Bytes that came over the network, and bytes that were here already. ``shown``: told of each step."""

    shown: Callable[[str, int], None] = lambda path, count: None
    fetched: int = 0
    reused: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, path: str, count: int, *, here: bool = False) -> None:
        with self._lock:
            self.fetched += 0 if here else count
            self.reused += count if here else 0
        self.shown(path, count)


class Fetch:
    """One model's files on their way into ``directory``.

    known: SHA-256 → a file of this cache said to hold it: copied instead of fetched, and verified like any other.
    """

    def __init__(
        self, source: Source, directory: Path, effort: Effort, tally: Tally, known: Mapping[str, Path] | None = None
    ) -> None:
        self._source, self._directory, self._effort, self._tally = source, directory, effort, tally
        self._known = known or {}
        self._stop = threading.Event()

    def all(self, files: Sequence[RemoteFile]) -> list[CachedFile]:
        """Every file, whole and verified. The first that fails ends the others; what is here stays for another attempt.

        Raises:
            CacheError: says of which file, and what happened. Changed: list the source anew.
        """
        with ThreadPoolExecutor(self._effort.files_at_once, thread_name_prefix="fetch") as pool:
            try:
                running = [pool.submit(self._one, file) for file in files]
                finished, _ = wait(running, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        return [future.result() for future in running]

    def _one(self, file: RemoteFile) -> CachedFile:
        failures, corrupt = 0, False
        part = Part(self._directory, file)
        self._tally.add(file.path, file.size if part.done else part.size, here=True)
        while True:
            part = Part(self._directory, file)
            before = part.size
            try:
                with _disk_errors(file):
                    sha256 = part.done or self._rest(part, fresh=corrupt)
                return CachedFile(path=file.path, size=file.size, sha256=sha256, validator=file.validator)
            except Corrupt:
                if corrupt:
                    raise
                corrupt = True  # once more from zero: the disk's bytes or the network's may be to blame
            except Transient as error:
                failures = 0 if Part(self._directory, file).size > before else failures + 1
                if failures > self._effort.retries:
                    raise CacheError(f"{error} (given up after {failures} attempts; what is here stays)") from error
                self._pause(failures)

    def _pause(self, failures: int) -> None:
        if failures:
            longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (failures - 1))
            self._stop.wait(longest_s * random.uniform(0.5, 1))
        if self._stop.is_set():
            raise CacheError("ended because another file failed")

    def _rest(self, part: Part, *, fresh: bool) -> str:
        """What is missing of a file; returns its SHA-256."""
        with part:
            if fresh:
                part.restart()
            digests = Digests(part.file)
            for data in part.chunks():
                digests.feed(data)
            if part.offset < part.file.size:
                digests = self._from_here(part, digests, fresh=fresh) or self._from_source(part, digests)
            sha256 = _checked(part, digests)
            part.finish(sha256)
            return sha256

    def _from_here(self, part: Part, digests: Digests, *, fresh: bool) -> Digests | None:
        """From another entry of this cache, if one has the file; it is not believed, its digest is."""
        digest = part.file.digest
        here = (
            self._known.get(digest[1]) if digest and digest[0] == "sha256" and not part.offset and not fresh else None
        )
        if here is None or not here.is_file():
            return None
        with here.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                self._take(part, digests, data, here=True)
        return digests

    def _from_source(self, part: Part, digests: Digests) -> Digests:
        with self._source.read(part.file, part.offset) as (start, chunks):
            if start != part.offset:
                part.restart()
                digests = Digests(part.file)
            for data in chunks:
                self._take(part, digests, data)
        return digests

    def _take(self, part: Part, digests: Digests, data: bytes, *, here: bool = False) -> None:
        if self._stop.is_set():
            raise CacheError(f"{part.file.path}: ended because another file failed")
        if part.offset + len(data) > part.file.size:
            part.restart()
            raise Corrupt(f"{part.file.path}: longer than the {part.file.size} bytes that were promised")
        part.append(data)
        digests.feed(data)
        self._tally.add(part.file.path, len(data), here=here)


def _checked(part: Part, digests: Digests) -> str:
    if part.offset < part.file.size:
        raise Transient(f"{part.file.path}: the source ended after {part.offset} of {part.file.size} bytes")
    try:
        return digests.check()
    except Corrupt:
        part.restart()
        raise


@contextmanager
def _disk_errors(file: RemoteFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room (aim-runtime cache prune) and add it again: what is here stays"
            raise CacheError(f"{file.path}: {error.strerror} on the cache's volume: {remedy}") from error
        raise CacheError(f"{file.path}: {error.strerror or error} ({error.filename or 'the cache'})") from error


def missing_bytes(directory: Path, files: Iterable[RemoteFile]) -> int:
    """What is still to come of ``files``."""
    parts = [Part(directory, file) for file in files]
    return sum(0 if part.done else part.file.size - part.size for part in parts)


def check_space(volume: Path, needed_bytes: int, whose: str) -> None:
    """Raises CacheError: the volume has less than that to spare."""
    free = shutil.disk_usage(volume).free
    short = needed_bytes + _SPARE_BYTES - free
    if needed_bytes and short > 0:
        amounts = f"{gib(needed_bytes)} GiB are to be fetched, {gib(free)} GiB are free on {volume}"
        raise CacheError(
            f"{whose}: {amounts}: {max(short / GIB, 0.001):.3f} GiB short; make room with "
            "aim-runtime cache prune --max-size or --max-age"
        )
