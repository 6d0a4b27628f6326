"""Who changes an entry, and who uses it: locks of the kernel, which a process that dies cannot keep.

POSIX record locks (``fcntl.lockf``) hold on NFS and CephFS too, over machines; there is no heartbeat to miss and no
stale file to judge. They belong to a process: it must not open and close a file that it holds elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aim_runtime.cache.errors import Busy, CacheError

_HELD = (errno.EACCES, errno.EAGAIN)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 1.0


def _cannot(path: Path, error: OSError) -> CacheError:
    """File systems without locks answer ENOLCK, ENOSYS or EOPNOTSUPP."""
    return CacheError(
        f"{path}: {error.strerror}: the cache needs a file system with locks that can be written to "
        "(NFS: mount it without 'nolock')"
    )


@contextlib.contextmanager
def exclusive(path: Path, wait_s: float, waiting: Callable[[str], None] = lambda who: None) -> Iterator[None]:
    """Hold ``path`` alone. ``waiting`` is told once who holds it.

    Raises:
        Busy: others held it for ``wait_s`` seconds.
        CacheError: the file system has no locks, or cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _cannot(path, error) from None
    try:
        _wait_for(descriptor, path, wait_s, waiting)
        os.ftruncate(descriptor, 0)
        os.pwrite(
            descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}).encode(), 0
        )
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path, wait_s: float, waiting: Callable[[str], None]) -> None:
    deadline, pause_s, told = time.monotonic() + wait_s, _FIRST_WAIT_S, False
    while not _taken(descriptor, fcntl.LOCK_EX, path):
        who = _holder(descriptor)
        if not told:
            waiting(who)
            told = True
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise Busy(f"{path.stem}: {who} has been at it for longer than {wait_s:g} s: wait with --wait SECONDS")
        time.sleep(min(left_s, pause_s * random.uniform(0.5, 1)))
        pause_s = min(2 * pause_s, _LONGEST_WAIT_S)


def _taken(descriptor: int, how: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise _cannot(path, error) from None
    return True


def _holder(descriptor: int) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
        said = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(said['pid'])} on {str(said['host'])[:100]}"
    return "another process"


class Lease:
    """A reader's hold on an entry, shared with other readers, until :meth:`release` or the process's end.

    Raises:
        CacheError: there is no such file and it cannot be made, or the file system has no locks.
        Busy: the entry is being removed.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = _readable(path)
        try:
            if not _taken(self._descriptor, fcntl.LOCK_SH, path):
                raise Busy(f"{path.name}: is being removed by {_holder(self._descriptor)}")
            if not _is_at(self._descriptor, path):  # what a prune has removed since it was opened holds nothing
                raise Busy(f"{path.name}: was removed just now: ask again")
        except CacheError:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        os.close(self._descriptor)


def _readable(path: Path) -> int:
    """A descriptor: a volume may be mounted to be read only. One that somebody deleted is made anew if it is not."""
    try:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _cannot(path, error) from None


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@contextlib.contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Whether no reader holds ``path``; while the block runs, none can begin to. Raises CacheError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # its time stays: it is the last use
    except OSError as error:
        raise _cannot(path, error) from None
    try:
        yield _taken(descriptor, fcntl.LOCK_EX, path)
    finally:
        os.close(descriptor)
