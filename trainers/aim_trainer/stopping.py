"""Who is at a run, and how it is asked to stop: politely by a first signal, at once by a second."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .errors import StoreError
from .files import taken
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
        if not taken(lock):
            remedy = "wait for it, or name another directory"
            raise StoreError(f"{run.root}: another process is at this run", field="directory", remedy=remedy)
        yield
    finally:
        os.close(lock)


class Stopped(BaseException):
    """The run was asked to stop, and has. Like KeyboardInterrupt no error, so that nothing on its way takes it for one.

    `str()`: where it was; step: the last that was taken, None before and after training.
    """

    def __init__(self, where: str, step: int | None = None) -> None:
        super().__init__(where)
        self.step = step


class Stopping:
    """See `stopping`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._leaves: str | None = None

    @contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """For work that is made again from its beginning: a signal does not wait for the end of it.

        Raises Stopped: at the signal, or before the work is begun where that was asked already.
        """
        self._leaves = where
        try:
            if self._file.exists():
                raise Stopped(where)
            yield
        finally:
            self._leaves = None

    def asked(self, number: int, _frame: FrameType | None) -> None:
        """What a signal does."""
        if self._file.exists():
            os._exit(128 + number)
        self._file.touch()
        if self._leaves is not None:
            raise Stopped(self._leaves)


@contextmanager
def stopping(file: Path) -> Iterator[Stopping]:
    """SIGTERM and Ctrl-C make `file`, which every worker looks for; once more ends this process where it is.

    A file, for workers may be on other machines. What an earlier run left of it is removed.
    """
    file.unlink(missing_ok=True)
    stop = Stopping(file)
    before = {number: signal.signal(number, stop.asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
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
    try:
        run.stop.touch()
    except OSError as error:
        raise _no_run(run, error) from error
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
    except OSError as error:
        raise _no_run(run, error) from error
    try:
        return not taken(lock)
    finally:
        os.close(lock)


def _no_run(run: RunDirectory, error: OSError) -> StoreError:
    why = f"{run.root}: {error.strerror}"
    return StoreError(
        why, field="run", value=str(run.root), remedy="name the directory of a run, as who may write there"
    )
