"""``python orphans.py PID``: when that process has ended, however it ended, end what it had started.

vLLM's engine and its workers are processes of their own. They see to each other, but a parent that is killed (by hand,
or for want of memory) leaves them: they would go on holding the GPU's memory. In a pod the container's end takes them
along, on bare metal nobody does. Only the standard library, and nothing of ours: it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

_LOOK_S = 0.5


def end_with_this_process() -> subprocess.Popen[bytes]:
    """Start the watch over this process. End it where there is nothing left to watch."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # whatever ends our group must not end the watch
    )


def watch(parent: int) -> None:
    """Return when ``parent`` has ended, and with it all its descendants."""
    try:
        ended = os.pidfd_open(parent)
    except ProcessLookupError:
        return
    known: dict[int, str] = {}
    while not select.select([ended], [], [], _LOOK_S)[0]:
        known = {process: began for process, began in known.items() if _began(process) == began}
        known |= {process: _began(process) for process in descendants(parent) if process != os.getpid()}
    for process, began in known.items():
        if began and _began(process) == began:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def descendants(process: int) -> list[int]:
    """Its children, and theirs: proc(5), ``/proc/PID/task/TID/children``."""
    found, waiting = [], [process]
    while waiting:
        for file in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = [int(word) for word in file.read_text().split()]
                found += children
                waiting += children
    return found


def _began(process: int) -> str:
    """When it began, which tells it from another that gets its number later; empty where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


if __name__ == "__main__":
    watch(int(sys.argv[1]))
