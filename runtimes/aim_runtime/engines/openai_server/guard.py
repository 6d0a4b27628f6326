"""``python guard.py GRACE COMMAND…``: run a command of which nothing outlives the one who asked for it.

A server may have processes of its own that it does not end when it is killed. This process adopts them (a subreaper),
and ends all of them when the command ends or when its own standard input does: the asker holds the other end, and a
process that dies, however it dies, lets go of it. Only the standard library, and nothing of ours: it starts in
milliseconds and is in nobody's way.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main(grace_s: float, command: Sequence[str]) -> int:
    """The command's exit code; 128 + n after signal n, 127 if it cannot be started (as a shell has it). When the
    standard input ends, the command has ``grace_s`` from SIGTERM to SIGKILL."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        )
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return 127
    while child.poll() is None:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
        if 0 in readable and not os.read(0, 4096):
            _end(child, grace_s)
    _kill_descendants()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end(child: subprocess.Popen[bytes], grace_s: float) -> None:
    child.terminate()
    try:
        child.wait(grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _kill_descendants() -> None:
    while found := descendants(os.getpid()):
        for process in found:
            _signal(process, signal.SIGKILL)
        _reap()
        time.sleep(0.01)


def _signal(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def descendants(ancestor: int) -> list[int]:
    """By /proc/PID/stat (proc(5)): the parent is the second field after the command, which stands in parentheses."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it has just ended
    found: list[int] = []
    for process in parents:
        seen = process
        while seen in parents and seen != ancestor:
            seen = parents[seen]
        if seen == ancestor and process != ancestor:
            found.append(process)
    return found


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
