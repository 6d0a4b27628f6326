"""`progress.json`: how far a run is, for a controller or a person beside it."""

from __future__ import annotations

import math
import time
from pathlib import Path

from aim_trainer.files import write_whole

from .records import Record
from .trainer_status import TrainerStatus

#: Two writes are at least so far apart; the last step, evaluations, checkpoints and notes are written at once.
INTERVAL_S = 1.0


class Progress:
    """Replaces the file as a whole: a reader never sees half of one. Goes on from what it says already."""

    def __init__(self, file: Path, interval_s: float = INTERVAL_S) -> None:
        self._file, self._interval_s = file, interval_s
        self._status = TrainerStatus(_bytes_of(file))
        self._written_at = -math.inf

    def tell(self, record: Record) -> None:
        """Raises OSError: the place is full or away."""
        at_once = self._status.add(record)
        if at_once or time.monotonic() - self._written_at >= self._interval_s:
            self._write()

    def close(self) -> None:
        """Writes what was held back."""
        if self._status.step is not None:
            self._write()

    def _write(self) -> None:
        write_whole(self._file, self._status.body())
        self._written_at = time.monotonic()


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
