"""What an engine's process prints: into our log line by line, and the last of it kept for when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

logger = logging.getLogger("aim.engine")

_LINE_BYTES = 2000
_KEPT_LINES = 20
_LINES_A_SECOND = 100  #: in our log; the rest is counted. Reading never stops: the process must not wait for us.
_TOLD_LINES, _TOLD_CHARACTERS = 3, 300


class Words(asyncio.Protocol):
    """The reading end of a process's output.

    Args:
        model: whose process it is; every line of the log says so.
    """

    def __init__(self, model: str) -> None:
        self.ended = asyncio.Event()
        self._model = model
        self._rest = b""
        self._kept: deque[str] = deque(maxlen=_KEPT_LINES)
        self._second = 0
        self._logged = self._left_out = 0

    @property
    def last(self) -> str:
        """The last lines, in one, bounded; empty if there were none."""
        told = list(self._kept)[-_TOLD_LINES:]
        while len(told) > 1 and sum(map(len, told)) > _TOLD_CHARACTERS:
            del told[0]
        return " / ".join(line.strip() for line in told)[:_TOLD_CHARACTERS]

    def data_received(self, data: bytes) -> None:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()[-_LINE_BYTES:]
        room = self._room()
        for line in lines[:room]:
            self._say(line)
        self._left_out += max(0, len(lines) - room)
        for line in lines[room:][-_KEPT_LINES:]:
            self._keep(line)

    def connection_lost(self, error: Exception | None) -> None:
        self._say(self._rest)
        self._tell_left_out()
        self.ended.set()

    def _room(self) -> int:
        """Lines that may still be logged in this second."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._logged = second, 0
            self._tell_left_out()
        return max(0, _LINES_A_SECOND - self._logged)

    def _say(self, line: bytes) -> None:
        text = self._keep(line)
        if text:
            self._logged += 1
            logger.info("model %s: %s", self._model, text)

    def _keep(self, line: bytes) -> str:
        text = line[:_LINE_BYTES].decode("utf-8", "replace").rstrip()
        if text:
            self._kept.append(text)
        return text

    def _tell_left_out(self) -> None:
        if self._left_out:
            logger.warning("model %s: its process prints too much: %d lines left out", self._model, self._left_out)
            self._left_out = 0
