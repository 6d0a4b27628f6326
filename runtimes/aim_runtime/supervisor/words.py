"""What an engine's process prints: into our log line by line, and the last of it kept for when it dies.

What it logs has the level in front of each line, as systemd reads it (sd-daemon(3)): ``<4>aim.child: …``.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque

from aim_kserve.log import printable

logger = logging.getLogger("aim.engine")

_LINE_BYTES = 2000
_KEPT_LINES = 20
_LINES_A_SECOND = 100  #: in our log; the rest is counted. Reading never stops: the process must not wait for us.
_TOLD_LINES, _TOLD_CHARACTERS = 3, 300
_LEVELS = {b"2": logging.CRITICAL, b"3": logging.ERROR, b"4": logging.WARNING, b"6": logging.INFO, b"7": logging.DEBUG}
_NUMBERS = {level: number.decode() for number, level in _LEVELS.items()}
_PREFIX = re.compile(rb"<([23467])>")
#: What shows where in a program something happened, not what.
_TRACE = re.compile(r"\s|Traceback \(most recent call last\)")


class Prefixed(logging.Formatter):
    """The process's side: each line of a record with its level."""

    def format(self, record: logging.LogRecord) -> str:
        level = max((level for level in _NUMBERS if level <= record.levelno), default=logging.DEBUG)
        return "\n".join(f"<{_NUMBERS[level]}>{line}" for line in super().format(record).split("\n"))


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
        """The last lines, in one, bounded; empty if there were none. Of a trace its last line, what went wrong."""
        told = [line for line in self._kept if not _TRACE.match(line)][-_TOLD_LINES:]
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
            prefix = _PREFIX.match(line)
            self._logged += 1
            logger.log(_LEVELS[prefix[1]] if prefix else logging.INFO, "model %s: %s", self._model, text)

    def _keep(self, line: bytes) -> str:
        """``line`` as a terminal would show it: what follows its last carriage return, and nothing that moves it."""
        shown = _PREFIX.sub(b"", line.rstrip(), count=1).rpartition(b"\r")[2]
        text = printable(shown[:_LINE_BYTES].decode("utf-8", "replace"))
        if text:
            self._kept.append(text)
        return text

    def _tell_left_out(self) -> None:
        if self._left_out:
            logger.warning("model %s: its process prints too much: %d lines left out", self._model, self._left_out)
            self._left_out = 0
