"""Real servers that models come from (their servers: docker_registry, rclone_servers), and a wire that counts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def random_model(directory: Path, *sizes: int) -> dict[str, str]:
    """Shards of those sizes and a configuration; file → SHA-256."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for number, size in enumerate(sizes, 1):
        (directory / f"model-{number:05}-of-{len(sizes):05}.safetensors").write_bytes(os.urandom(size))
    return digests(directory)


def digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class Wire:
    """``with Wire(port) as wire``: a TCP relay to ``port`` that counts the bytes that come back.

    ``at(count, call)``: call once, when so many have passed.
    """

    def __init__(self, port: int) -> None:
        self._to, self.bytes = port, 0
        self._lock, self._due = threading.Lock(), (sys.maxsize, lambda: None)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]

    def at(self, count: int, call: Callable[[], object]) -> None:
        with self._lock:
            self._due = (count, call)  # type: ignore[assignment]

    def __enter__(self) -> Wire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for side in (client, server):  # small buffers: what was sent and not read is a kill's loss
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
                threading.Thread(target=self._relay, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._relay, args=(server, client, True), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
                if counted:
                    self._count(len(data))
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()

    def _count(self, count: int) -> None:
        with self._lock:
            self.bytes += count
            due, call = self._due
            if self.bytes < due:
                return
            self._due = (sys.maxsize, lambda: None)  # type: ignore[assignment]
        call()


def cache_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "aim_runtime", "cache", *arguments]


def cache_verb(
    *arguments: str, env: Mapping[str, str] | None = None, preexec_fn: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """``aim-runtime cache`` in a process of its own."""
    return subprocess.run(
        cache_command(*arguments),
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=preexec_fn,
        timeout=120,
    )
