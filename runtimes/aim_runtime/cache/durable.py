"""Files and links of a volume that are there and whole, or not there."""

from __future__ import annotations

import os
from pathlib import Path

from aim_kserve.durable import sync_directory, temporary_beside, write_atomically

#: Which boot of which machine: what was written without fsync survives a killed process, but no other kernel's end.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot() -> str:
    """A word that is another one after this machine was started anew; empty where nobody can tell."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def write_in_place(path: Path, data: bytes) -> None:
    """``path``, in a folder that is made, holds ``data`` or what it held before. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def link_atomically(link: Path, target: Path) -> None:
    """``link`` points to ``target``, by a relative path, so that the volume may be mounted anywhere. Raises OSError."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(link)
    temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    try:
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(link.parent)
