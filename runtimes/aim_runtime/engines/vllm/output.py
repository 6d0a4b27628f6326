"""What vLLM's processes print while they load, and the reason among it when they die.

A model is loaded in child processes. When one fails, the parent learns "Engine core initialization failed. See
root cause above": the root cause is only in what the child printed (logged to stdout, or a traceback on stderr). So
while loading, the children inherit pipes in place of both; what they print is passed on byte for byte, and the
first line that names an exception is remembered.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from types import TracebackType

from pydantic import ValidationError

#: ``(Worker pid=7) ERROR 11-21 10:00:00 [core.py:99] ValueError: reason`` or the bare last line of a traceback.
CAUSE = re.compile(rb"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?((?:\w+\.)*\w*(?:Error|Exception)): (\S.*)$")
#: Exceptions that only pass on that another process had one.
SECOND_HAND = ("Engine core initialization failed", "WorkerProc initialization failed")
LONGEST_REASON = 400
#: A dead child's last words are in the pipe already; a living one (multiprocessing's resource tracker) keeps it open.
LAST_WORDS_S = 0.5


class ChildOutput:
    """Inside the context, processes that are started print through us."""

    def __init__(self) -> None:
        self._cause: str | None = None
        self._relays: list[threading.Thread] = []

    def __enter__(self) -> ChildOutput:
        self._flush()
        self._saved = [(number, os.dup(number)) for number in (1, 2)]
        for number, original in self._saved:
            read_end, write_end = os.pipe()
            os.dup2(write_end, number)
            os.close(write_end)
            relay = threading.Thread(target=self._relay, args=(read_end, os.dup(original)), daemon=True)
            relay.start()
            self._relays.append(relay)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def cause(self) -> str | None:
        """The first exception a child printed, in one line; None if there was none. Ends the capture."""
        self._restore()
        for relay in self._relays:
            relay.join(LAST_WORDS_S)
        return self._cause

    def _restore(self) -> None:
        self._flush()
        while self._saved:
            number, original = self._saved.pop()
            os.dup2(original, number)
            os.close(original)

    @staticmethod
    def _flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    def _relay(self, read_end: int, original: int) -> None:
        unfinished = b""
        while chunk := os.read(read_end, 65536):
            _write_all(original, chunk)
            *lines, unfinished = (unfinished + chunk).split(b"\n")
            unfinished = unfinished[-LONGEST_REASON:]
            if self._cause is None:
                self._cause = next(filter(None, map(_cause_in, lines)), None)
        os.close(read_end)
        os.close(original)


def _write_all(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]


def _cause_in(line: bytes) -> str | None:
    found = CAUSE.search(line.rstrip())
    if found is None:
        return None
    reason = found[2].decode(errors="replace")
    return None if reason.startswith(SECOND_HAND) else f"{found[1].decode()}: {shortened(reason)}"


def one_line(error: BaseException) -> str:
    """An exception's reason without pydantic's frame, tracebacks and thousand-name lists."""
    if isinstance(error, ValidationError):
        text = str(error.errors(include_url=False, include_input=False)[0]["msg"]).removeprefix("Value error, ")
    else:
        text = str(error)
    return shortened(" ".join(text.partition(" Supported architectures:")[0].split()))


def is_second_hand(error: BaseException) -> bool:
    """Whether ``error`` only says that a child process failed."""
    return str(error).startswith(SECOND_HAND)


def shortened(reason: str) -> str:
    return reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + "…"
