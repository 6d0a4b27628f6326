"""What every source of models is to the rest of the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from aim_runtime.cache.errors import Corrupt

#: How a source says what a file holds. git-sha1: of the blob, as Git names it (its size first).
Algorithm = Literal["sha256", "git-sha1", "md5"]
CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a source.

    path: where it goes in the model's directory; checked. size: bytes. locator: what the source calls it.
    digest: what the source promises. validator: changes when the file does (ETag, version, time); empty: nobody says.
    """

    path: str
    size: int
    locator: str
    digest: tuple[Algorithm, str] | None = None
    validator: str = ""

    @property
    def resumable(self) -> bool:
        """Whether bytes of an earlier attempt can be told to be of the same file."""
        return bool(self.validator or self.digest)


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of a source at one revision (a commit, a manifest's digest; empty where there is none)."""

    revision: str
    files: tuple[RemoteFile, ...]


class Source(Protocol):
    """Reads one model. Every call may raise CacheError (Transient, Changed)."""

    def listing(self) -> Listing:
        """What there is now."""
        ...

    def read(self, file: RemoteFile, offset: int) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """The bytes of ``file``: from which one on they really come (``offset``, or 0), and the bytes."""
        ...


class Digests:
    """SHA-256 of what passes, and what the source promised beside it."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._other = _other(file)

    def feed(self, data: bytes) -> None:
        self._sha256.update(data)
        if self._other is not None:
            self._other.update(data)

    def check(self) -> str:
        """The SHA-256, in hexadecimal. Raises Corrupt: it is not what the source promised."""
        found = self._sha256.hexdigest()
        if self._file.digest is not None:
            algorithm, expected = self._file.digest
            seen = found if self._other is None else self._other.hexdigest()
            if seen != expected:
                raise Corrupt(f"{self._file.path}: {algorithm} is {seen}, the source promised {expected}")
        return found


def _other(file: RemoteFile) -> hashlib._Hash | None:
    algorithm = None if file.digest is None else file.digest[0]
    if algorithm == "git-sha1":
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return hashlib.md5(usedforsecurity=False) if algorithm == "md5" else None
