"""SIGTERM before the server has a handler of its own. Imports nothing heavy: it comes before what does."""

from __future__ import annotations

import os
import signal
from types import FrameType


def end_while_starting() -> None:
    """From now until the server runs, SIGTERM ends the process with exit 0.

    Without a handler it would end with the signal, and the first process of a container, which gets no signal that it
    does not handle, would not end at all.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(0)  # nothing is open yet, and half-imported modules have nothing to say at the interpreter's end
