"""Files that are either there and whole, or not there: temporary file, fsync, rename, fsync of the directory."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path

#: Which boot of which machine: what was written without fsync survives a killed process, but no other kernel's end.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: What a file or link is called before it gets its name.
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


def boot() -> str:
    """A word that is another one after this machine was started anew; empty where nobody can tell."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def sync_directory(directory: Path) -> None:
    """A rename in ``directory`` survives a power cut after this. Some network file systems cannot: they need not."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """``path`` holds ``data`` or what it held before, whatever happens. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def link_atomically(link: Path, target: Path) -> None:
    """``link`` points to ``target``, by a relative path, so that the volume may be mounted anywhere. Raises OSError."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    try:
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(link.parent)
