"""Files that are either there and whole, or not there: temporary file, fsync, rename, fsync of the directory."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path

#: What a file or link is called before it gets its name.
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that nobody else has."""
    return path.with_name(f".{uuid.uuid4().hex}.tmp")


def sync_directory(directory: Path) -> None:
    """A rename in ``directory`` survives a power cut after this. Some network file systems cannot: they need not."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """``path`` holds ``data`` or what it held before, whatever happens. A link becomes a file: resolve it first where
    it shall stay one. mode: of a new file, less what the umask takes. Raises OSError."""
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
