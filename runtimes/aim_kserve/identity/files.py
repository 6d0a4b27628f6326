"""Files that somebody else replaces while we serve: noticed, and read within bounds."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("aim.identity")

Signature = tuple[int, int, int, int]


def signature(path: Path) -> Signature | None:
    """What differs once the file is another, or has other content; None where there is none. A Kubernetes Secret's
    files are links, over ``..data``, to a folder that is another after each change: so is the inode that is found."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size, found.st_ctime_ns


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The file. Raises OSError where it cannot be read or is a pipe or device, for which a reader would wait,
    ValueError where it is larger."""
    with open(path, "rb", opener=_at_once) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(f"larger than {max_bytes} bytes")
    return raw


def _at_once(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a folder" if stat.S_ISDIR(mode) else "a pipe or device", path)
    return descriptor


class Follower:
    """A thread that calls ``look`` every ``every_s`` seconds, and when it is woken: reading never waits for a request,
    nor a request for reading, and a volume that hangs holds up neither the event loop nor the end of the process."""

    def __init__(self, name: str, look: Callable[[], None], *, every_s: float = 1.0) -> None:
        self._look, self._every_s = look, every_s
        self._woken, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Look now. From any thread."""
        self._woken.set()

    def stop(self) -> None:
        """Look no more; a look that is going on ends by itself."""
        self._stopped.set()
        self._woken.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._woken.wait(self._every_s)
            self._woken.clear()
            if self._stopped.is_set():
                return
            try:
                self._look()
            except Exception:  # the thread's edge: without it nobody would notice a change any more
                logger.exception("%s failed", self._thread.name)
