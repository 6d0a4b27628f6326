"""How far a fetch is: bars on a terminal, else a line now and then. On stderr: stdout is the command's answer."""

from __future__ import annotations

import sys
import threading
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from aim_profile.units import gib
from aim_runtime.cache.add import Watching

_LINE_EVERY_S = 10.0


def shown() -> Watching:
    """What suits stderr."""
    return Bars() if sys.stderr.isatty() else Lines()


class Lines(Watching):
    """A line each ten seconds, and one at the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name, self._total, self._done, self._told = "", 0, 0, 0.0

    def begins(self, name: str, total_bytes: int) -> None:
        self._name, self._total, self._done, self._told = name, total_bytes, 0, time.monotonic()
        self.says(f"{name}: {gib(total_bytes)} GiB")

    def advances(self, path: str, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() - self._told < _LINE_EVERY_S:
                return
            self._told = time.monotonic()
        share = min(1.0, self._done / self._total) if self._total else 1.0
        self.says(f"{self._name}: {gib(self._done)} of {gib(self._total)} GiB ({share:.0%})")

    def says(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201  a command's progress


class Bars(Watching):
    """A bar for the whole."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars: Progress | None = None
        self._task = TaskID(0)

    def begins(self, name: str, total_bytes: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        self._bars = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=self._console)
        self._task = self._bars.add_task(name, total=total_bytes)
        self._bars.start()

    def advances(self, path: str, count: int) -> None:
        if self._bars is not None:
            self._bars.advance(self._task, count)

    def says(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def ends(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
