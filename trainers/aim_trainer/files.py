"""Files of this machine: replaced as a whole, held by one process, told by their content."""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path


def write_whole(file: Path, content: bytes) -> None:
    """A reader finds what was there before or all of `content`. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".part")
    partial.write_bytes(content)
    partial.replace(file)


def taken(lock: int) -> bool:
    """Takes the lock of an open file or directory until its descriptor is closed; False: another has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sha256_of(file: Path) -> str:
    """Hexadecimal; reads the file in pieces. Raises OSError."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
