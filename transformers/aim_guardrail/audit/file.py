"""The audit's file: appended to by one process, whole lines only, under whatever file has its name now."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from pathlib import Path
from typing import Any

from aim_guardrail.audit.chain import MAX_LINE_BYTES, Last, last_of, sealed

logger = logging.getLogger("aim.audit")

_MODE = 0o640


class AuditFile:
    """Not thread-safe.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no audit's, or another process writes to it.
    """

    def __init__(self, path: Path, key: bytes | None) -> None:
        self._path, self._key = path, key
        self._last = Last()
        self._descriptor = self._open()

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Write them, all or none; to a new file where this one has been moved away.

        Raises:
            OSError, ValueError: they could not be written.
        """
        if self._was_moved():
            fresh = self._open()
            os.close(self._descriptor)
            self._descriptor = fresh
        lines, last = bytearray(), self._last
        for fields in entries:
            line, last = sealed(fields, last, self._key)
            lines += line
        self._write(bytes(lines))
        self._last = last

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, lines: bytes) -> None:
        before = os.fstat(self._descriptor).st_size
        done = 0
        try:
            while done < len(lines):
                done += os.write(self._descriptor, lines[done:])
        except OSError:
            if done:
                os.ftruncate(self._descriptor, before)
            raise

    def _was_moved(self) -> bool:
        ours = os.fstat(self._descriptor)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return True
        return (there.st_ino, there.st_dev) != (ours.st_ino, ours.st_dev)

    def _open(self) -> int:
        """The file, locked, its chain taken up; a line that a crash cut short is cut off."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(self._path, flags, _MODE)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("is no regular file")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError("another process writes to it: give each its own") from None
            self._take_up(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _take_up(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        start = max(0, size - 2 * MAX_LINE_BYTES)
        tail = os.pread(descriptor, size - start, start)
        end = tail.rfind(b"\n") + 1
        if end == 0 and start:
            raise ValueError("its last line is none of an audit")
        if end:
            self._last = last_of(tail[tail.rfind(b"\n", 0, end - 1) + 1 : end])
        if end < len(tail):
            logger.warning("%s: %d bytes of a line that a crash cut short are cut off", self._path, len(tail) - end)
            os.ftruncate(descriptor, start + end)
