"""rclone's servers: a real S3 and a real HTTP, of a directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ports import free_ports

S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def rclone() -> str:
    return shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))


@contextlib.contextmanager
def process(command: Sequence[str], port: int, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """A server that listens on ``port``; ended with the block."""
    started = subprocess.Popen(
        command, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            assert started.poll() is None, f"{command[:3]} ended"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < deadline, f"{command[:3]} does not listen"
            time.sleep(0.03)
        yield
    finally:
        started.kill()
        started.wait()


@contextlib.contextmanager
def s3_server(directory: Path, port: int = 0, *, written_to: bool = False) -> Iterator[int]:
    """rclone's S3 server; each folder of ``directory`` is a bucket. Yields its port.

    written_to: by its clients. Else every request sees the directory as it is on the disk, but writing may hang: this
    rclone's listings that are never kept wait for one another then.
    """
    port = port or free_ports(1)[0]
    flags = [
        *("--addr", f"127.0.0.1:{port}"),
        *("--auth-key", "key,secret"),
        *("--vfs-cache-mode", "off"),
        *(() if written_to else ("--dir-cache-time", "0s")),
        *("--config", "/dev/null"),
    ]
    with process([rclone(), "serve", "s3", *flags, str(directory)], port):
        yield port


@contextlib.contextmanager
def http_server(directory: Path) -> Iterator[int]:
    """rclone's HTTP server: ranges, and index pages."""
    (port,) = free_ports(1)
    flags = ["--addr", f"127.0.0.1:{port}", "--dir-cache-time", "0s", "--config", "/dev/null"]
    with process([rclone(), "serve", "http", *flags, str(directory)], port):
        yield port
