"""What a place can do, and which names are safe in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from aim_trainer.errors import StoreError

_MOST_OF_A_PART, _MOST_OF_A_NAME = 255, 1024  # bytes: NAME_MAX; S3's longest key


class Entry(NamedTuple):
    """A file: its name below the place, with `/` between parts, and its size in bytes."""

    name: str
    size: int


class Place(Protocol):
    """A tree of files under a URI. Names are relative, with `/`; one that would leave the place is refused.

    Every method raises StoreError: it names the URI and what to do. A place that is away is tried again for a while.
    """

    uri: str

    def at(self, name: str) -> Place:
        """The place below this one. It need not exist."""
        ...

    def files(self) -> tuple[Entry, ...]:
        """All files below, sorted by name; none where the place does not exist."""
        ...

    def folders(self) -> tuple[str, ...]:
        """Names of what lies directly below and holds files of its own, sorted."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def read(self, name: str, into: Path) -> Path:
        """Copies a file to the path `into`, whole or not at all. Returns `into`."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """A small file."""
        ...

    def write(self, name: str, file: Path) -> None:
        """Copies a local file there. Readers see the old one or the new one, never a part."""
        ...

    def write_bytes(self, name: str, data: bytes) -> None:
        """The same, of a small file."""
        ...

    def remove(self, name: str = "") -> None:
        """Removes a file, or all files below; nothing where there is none. Empty: the place itself."""
        ...

    def path(self) -> Path | None:
        """Where it is on this machine, if it is."""
        ...


def checked(name: str, uri: str) -> str:
    """`name` if it stays in the place at `uri`. Raises StoreError: `..`, absolute, empty parts, odd characters."""
    parts = name.split("/")
    odd = "\\" in name or any(ord(char) < 32 or ord(char) == 127 for char in name)
    if odd or any(part in ("", ".", "..") or len(part.encode(errors="replace")) > _MOST_OF_A_PART for part in parts):
        raise _refused(name, uri)
    if len(name.encode(errors="replace")) > _MOST_OF_A_NAME:
        raise _refused(name, uri)
    return name


def _refused(name: str, uri: str) -> StoreError:
    return StoreError(
        f"{uri}: the name {name[:100]!r} is refused: it would not stay in there",
        field="name",
        value=name,
        remedy="give a relative name without '..', backslashes or control characters",
    )
