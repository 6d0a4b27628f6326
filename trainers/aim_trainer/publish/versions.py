"""v1, v2, …: versions of one name in a place. What was published is never written again; equal content is one version.

A version counts from the moment its commit is there, which is written last: what a killed publisher leaves has none, is
never taken for whole, and keeps its number. Publishers at once take different numbers.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from aim_trainer.errors import StoreError
from aim_trainer.files import sha256_of

COMMIT = "COMMIT.json"
#: Numbers that others took under our hands before we give up.
_ATTEMPTS = 50


@dataclass(frozen=True, slots=True)
class Commit:
    """What a version holds. digest: of all its files, names and content; files: path → SHA-256 and bytes."""

    digest: str
    files: dict[str, tuple[str, int]]

    def text(self) -> str:
        """As COMMIT.json; equal content is equal text."""
        files = {path: {"sha256": sha256, "bytes": size} for path, (sha256, size) in self.files.items()}
        return json.dumps({"digest": self.digest, "files": files}, indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True, slots=True)
class Version:
    """A version that is whole. is_new: False where it was there already with the same content."""

    number: int
    uri: str
    digest: str
    is_new: bool

    @property
    def name(self) -> str:
        return name_of(self.number)


class Destination(Protocol):
    """A place of versions. Every method raises StoreError where the place cannot be used."""

    def check(self) -> None:
        """Raises StoreError where nothing could be published now. Leaves nothing that counts."""
        ...

    def published(self) -> dict[int, str | None]:
        """Every number that was ever begun → the digest of its content; None: not whole."""
        ...

    def uri(self, number: int) -> str:
        """Where that version is, for whoever serves it."""
        ...

    def add(self, number: int, files: Path, commit: Commit) -> bool:
        """Writes all files, then the commit, then the pointer to the newest. False: another took the number first."""
        ...


def name_of(number: int) -> str:
    """`v3`."""
    return f"v{number}"


def number_of(name: str) -> int | None:
    """3 of `v3`; None of what is no version's name."""
    digits = name.removeprefix("v")
    return int(digits) if name.startswith("v") and digits.isascii() and digits.isdigit() and digits[0] != "0" else None


def commit_of(files: Path) -> Commit:
    """Reads every file below `files` once."""
    held = {path.relative_to(files).as_posix(): path for path in sorted(files.rglob("*")) if path.is_file()}
    listed = {name: (sha256_of(path), path.stat().st_size) for name, path in held.items()}
    whole = hashlib.sha256("".join(f"{name}\0{sha256}\n" for name, (sha256, _) in listed.items()).encode())
    return Commit(f"sha256:{whole.hexdigest()}", listed)


def publish_files(files: Path, destination: Destination) -> Version:
    """The directory `files` as the next version, or the one that has this content already. Raises StoreError."""
    commit = commit_of(files)
    for _ in range(_ATTEMPTS):
        known = destination.published()
        if (same := next((number for number, digest in known.items() if digest == commit.digest), None)) is not None:
            return Version(same, destination.uri(same), commit.digest, is_new=False)
        number = max(known, default=0) + 1
        if destination.add(number, files, commit):
            return Version(number, destination.uri(number), commit.digest, is_new=True)
        time.sleep(random.uniform(0, 0.05))  # two that met once should not meet again
    raise StoreError(
        f"output.registry: {_ATTEMPTS} numbers in a row were taken by other publishers",
        field="output.registry",
        remedy="try again when fewer publish at once",
    )
