"""Who is at a run, and how it is asked to stop: politely by a first signal, at once by a second."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .errors import StoreError
from .run_directory import RunDirectory

_LOOK_S = 0.2


@contextmanager
def alone(run: RunDirectory) -> Iterator[None]:
    """Held until the end of the process at the latest. Raises StoreError: another process is at this run."""
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        lock = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(f"{run.root}: {error.strerror}", field="directory", remedy="name another directory") from error
    try:
        if not _taken(lock):
            remedy = "wait for it, or name another directory"
            raise StoreError(f"{run.root}: another process is at this run", field="directory", remedy=remedy)
        yield
    finally:
        os.close(lock)


@contextmanager
def stopping(file: Path) -> Iterator[None]:
    """SIGTERM and Ctrl-C make `file`, which every worker looks for; once more ends this process where it is.

    A file, for workers may be on other machines. What an earlier run left of it is removed.
    """
    file.unlink(missing_ok=True)

    def asked(number: int, _frame: FrameType | None) -> None:
        if file.exists():
            os._exit(128 + number)
        file.touch()

    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        file.unlink(missing_ok=True)


def pause(run: RunDirectory, patience_s: float) -> bool:
    """Asks whoever is at the run to stop, from any machine that sees its directory, and waits until it has saved.

    False: nobody is at it. Raises StoreError where it takes longer than patience_s.
    """
    if not _is_driven(run):
        return False
    run.stop.touch()
    until = time.monotonic() + patience_s
    while _is_driven(run):
        if time.monotonic() >= until:
            raise StoreError(
                f"{run.root}: has not stopped within {patience_s:.0f} s",
                field="run",
                value=str(run.root),
                remedy="wait longer: it stops after the step it is at",
            )
        time.sleep(_LOOK_S)
    return True


def _is_driven(run: RunDirectory) -> bool:
    try:
        lock = os.open(run.lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _taken(lock)
    finally:
        os.close(lock)


def _taken(lock: int) -> bool:
    """Takes a lock until its descriptor is closed; False: another has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
