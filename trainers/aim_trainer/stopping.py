"""How a run is asked to stop: politely by a first signal, at once by a second."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


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
