"""How an engine's process is started, and how it is ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from aim_runtime.engines.base import EngineSpec

from .frames import Start, encode

#: What runs in the process; tests give their own.
CHILD = "aim_runtime.supervisor.child"
#: Folders of an environment: their packages belong to its own interpreter and to no other.
_INSTALLED = frozenset({"site-packages", "dist-packages"})


@dataclass(frozen=True, slots=True)
class Launch:
    """An engine's process.

    spec: what it serves.
    python: the interpreter, where the engine's library lives; ours by default.
    env: set on top of our environment before anything is imported (the one variable that says which devices are seen,
        ``OMP_NUM_THREADS`` …).
    cpus: the CPUs it may use; None: ours.
    memory_bytes: most anonymous memory (``RLIMIT_DATA``: a mapped model file is not counted); None: no limit.
    log_levels: logger ("": the root) → level, where it is not the default.
    """

    spec: EngineSpec
    python: str = sys.executable
    env: Mapping[str, str] = field(default_factory=dict)
    cpus: frozenset[int] | None = None
    memory_bytes: int | None = None
    log_levels: Mapping[str, str] = field(default_factory=dict)


class Process:
    """A started process and our end of its socket. It is in a session of its own: what a terminal or a supervisor
    sends to our process group does not reach it, we end it."""

    def __init__(self, launch: Launch) -> None:
        """Start it; it begins to load at once, whether anybody listens yet or not.

        Raises:
            OSError: there is no such interpreter, or no room for a process.
        """
        self.socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._popen = subprocess.Popen(
                    [launch.python, "-m", CHILD, str(theirs.fileno())],
                    env=_environment(launch),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,  # our stdout is the access log's
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError:
                self.socket.close()
                raise
        self.pid = self._popen.pid
        assert self._popen.stdout is not None
        self.output = self._popen.stdout
        start = Start(launch.spec, os.getpid(), launch.cpus, launch.memory_bytes, dict(launch.log_levels))
        with contextlib.suppress(OSError):  # it has ended already: whoever waits for it is told
            self.socket.sendall(encode([start]))
        self.exit_fd = os.pidfd_open(self.pid)

    @property
    def running(self) -> bool:
        """False once it has been reaped."""
        return self._popen.returncode is None

    def kill(self) -> None:
        """End it and all that it started, at once."""
        if not self.running:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for descendant in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    descendant.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # before it is reaped: the number is still its own

    def reap(self) -> str:
        """Wait for its end, which must have begun, and say how it ended. Blocks for as long as the kernel takes."""
        self.kill()
        code = self._popen.wait()
        exit_fd, self.exit_fd = self.exit_fd, -1
        if exit_fd >= 0:  # asked a second time, the number may be somebody else's by now
            os.close(exit_fd)
        return how_it_ended(code)

    def discard(self) -> None:
        """End a process that nobody has listened to. Blocks for as long as the kernel takes."""
        self.reap()
        self.socket.close()
        self.output.close()


def how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (by hand, or for want of memory)" if -code == signal.SIGKILL else "")


def _environment(launch: Launch) -> dict[str, str]:
    """Ours with ``launch.env``, and so that ``aim_runtime`` is found: by another interpreter in its own environment, or
    else where we have it."""
    env = {**os.environ, **launch.env, "PYTHONSAFEPATH": "1"}
    roots = [root for root in _source_roots() if Path(root).name not in _INSTALLED]
    path = [*roots, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if path:
        env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    return env


def _source_roots() -> list[str]:
    import aim_kserve
    import aim_runtime

    return [str(Path(file).parents[1]) for file in (aim_runtime.__file__, aim_kserve.__file__) if file]
