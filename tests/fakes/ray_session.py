"""One Ray for the session: starting one takes ten seconds. A test that kills its node has one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from ports import free_ports


class Cluster(NamedTuple):
    """address: for RAY_ADDRESS; process: all of Ray's are its descendants."""

    address: str
    process: psutil.Process


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    """A head of 4 CPUs, as a process of its own."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as directory:  # sockets' paths must be short
        flags = ["--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={directory}"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", *flags]
        # On this machine's own address; its workers no slower than whoever waits for them.
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
            try:
                _wait_for(directory, head)
                yield Cluster(f"127.0.0.1:{port}", psutil.Process(head.pid))
            finally:
                _end(psutil.Process(head.pid))


def _wait_for(directory: str, head: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not list(Path(directory).glob("session_latest/sockets/raylet*")):
        assert head.poll() is None, "ray start ended"
        assert time.monotonic() < until, "Ray does not come up"
        time.sleep(0.1)


def _end(head: psutil.Process) -> None:
    processes = [*head.children(recursive=True), head]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=30)
