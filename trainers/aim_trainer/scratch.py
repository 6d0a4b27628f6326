"""Directories for a while, in TMPDIR. What a process that was killed left of them is taken away by the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .errors import ResourceError
from .files import taken

_PREFIX = "aim-trainer-"


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty directory, removed with the block: as large as what is put there. Raises ResourceError."""
    try:
        _sweep()
        directory, lock = _locked()
    except OSError as error:
        place = tempfile.gettempdir()
        raise ResourceError(
            f"TMPDIR: {place}: {error.strerror}",
            field="TMPDIR",
            value=place,
            remedy="make room there, or set TMPDIR to where there is",
        ) from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _locked() -> tuple[Path, int]:
    """The lock says that whoever made it lives: the system takes it back however that ends."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            lock = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:  # swept before it was locked
            continue
        with suppress(OSError):  # a file system without locks: there nothing is ever swept
            fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return directory, lock
        os.close(lock)


@cache
def _sweep() -> None:
    """Once in a process. Others' are left alone, and so is what is only called like ours."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid() and taken(lock):
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)
