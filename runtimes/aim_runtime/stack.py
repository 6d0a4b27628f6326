"""Both processes on this machine, started exactly as a pod would start them, ready, and stopped in order.

The transformer is started by its name, not imported: the two speak to each other by HTTP only.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LOG_DIR = Path(".run")
READY_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Stack:
    """Where the two processes listen. runtime_flags: of the runtime, beside or above the rest (`--models`, say)."""

    model_name: str
    model_dir: str
    host: str
    http_port: int
    grpc_port: int
    runtime_http_port: int
    runtime_grpc_port: int
    policy: str | None
    runtime_flags: tuple[str, ...] = ()
    ready_timeout_s: float = READY_TIMEOUT_S

    def commands(self) -> dict[str, list[str]]:
        """Process name → argv."""
        runtime = ["-m", "aim_runtime", "--model_dir", self.model_dir]
        guardrail = ["-m", "aim_guardrail", "--predictor_host", f"{self.host}:{self.runtime_http_port}"]
        guardrail += ["--predictor_credentials", "forward"]  # the runtime behind it is ours, and verifies them, too
        if self.policy:
            guardrail += ["--policy", self.policy]
        return {
            "runtime": [
                *runtime,
                *self._listen(self.runtime_http_port, self.runtime_grpc_port),
                *self.runtime_flags,
            ],
            "guardrail": [*guardrail, *self._listen(self.http_port, self.grpc_port)],
        }

    def _listen(self, http_port: int, grpc_port: int) -> list[str]:
        name = ["--model_name", self.model_name, "--host", self.host]
        return [*name, "--http_port", str(http_port), "--grpc_port", str(grpc_port)]

    @property
    def http_port_of(self) -> dict[str, int]:
        return {"runtime": self.runtime_http_port, "guardrail": self.http_port}

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.http_port}"


class NotStarted(Exception):
    """A process did not become ready; one line that says which and why."""


def check_ports(stack: Stack) -> None:
    """Name a taken port before anything is started.

    Raises:
        NotStarted: a port is taken; names it and the variable that moves it.
    """
    ports = {
        "HTTP_PORT": stack.http_port,
        "GRPC_PORT": stack.grpc_port,
        "RUNTIME_HTTP_PORT": stack.runtime_http_port,
        "RUNTIME_GRPC_PORT": stack.runtime_grpc_port,
    }
    for variable, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((stack.host, port))
            except OSError as error:
                raise NotStarted(
                    f"port {port} is taken ({error.strerror}): stop what uses it, or choose another {variable}="
                ) from error


@contextlib.contextmanager
def running(stack: Stack, *, show_logs: bool) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Both processes, ready; stopped by SIGTERM and awaited on the way out.

    Raises:
        NotStarted: a port is taken, or a process ended or stayed not ready.
    """
    check_ports(stack)
    LOG_DIR.mkdir(exist_ok=True)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, argv in stack.commands().items():
            processes[name] = _start(name, argv, show_logs=show_logs)
        for name, process in processes.items():
            _await_ready(name, process, stack)
        yield processes
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()


def _start(name: str, argv: list[str], *, show_logs: bool) -> subprocess.Popen[bytes]:
    log = (LOG_DIR / f"{name}.log").open("wb")
    # Children leave Ctrl-C to us, so that both drain in order instead of dying together.
    process = subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout is not None
    threading.Thread(target=_copy, args=(process.stdout, log, name if show_logs else None), daemon=True).start()
    return process


def _copy(source: IO[bytes], log: IO[bytes], shown_as: str | None) -> None:
    with source, log:
        for line in source:
            log.write(line)
            log.flush()
            if shown_as:
                sys.stdout.write(f"{shown_as:>9} | {line.decode(errors='replace')}")
                sys.stdout.flush()


def _await_ready(name: str, process: subprocess.Popen[bytes], stack: Stack) -> None:
    deadline = time.monotonic() + stack.ready_timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            time.sleep(0.1)  # let the log's last lines arrive
            lines = (LOG_DIR / f"{name}.log").read_text(errors="replace").strip().splitlines()
            raise NotStarted(
                f"{name} ended with exit {process.returncode}: {lines[-1] if lines else 'it said nothing'}"
            )
        with contextlib.suppress(OSError, http.client.HTTPException):
            if get(stack.host, stack.http_port_of[name], f"/v2/models/{stack.model_name}/ready")[0] == 200:
                return
        time.sleep(0.25)
    raise NotStarted(f"{name} was not ready after {stack.ready_timeout_s:g} s: see {LOG_DIR / name}.log")


def get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body of a GET."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
