"""Real servers that models come from (a Docker registry; rclone's are in rclone_servers), and a wire that counts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx

from ports import free_ports
from rclone_servers import process

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


class Registry:
    """``with Registry(directory) as registry``: Debian's docker-registry, its storage below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (self.port,) = free_ports(1)
        self.host = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Registry:
        self._directory.mkdir()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._serving(self.port, {}))
        return self

    @contextlib.contextmanager
    def _serving(self, port: int, auth: Mapping[str, object]) -> Iterator[None]:
        config = {
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(self._directory)}},
            "http": {"addr": f"127.0.0.1:{port}"},
            **auth,
        }
        file = self._directory.with_suffix(f".{port}.yml")
        file.write_text(json.dumps(config))  # JSON is YAML
        with process(["docker-registry", "serve", str(file)], port):
            yield

    @contextlib.contextmanager
    def with_password(self) -> Iterator[str]:
        """The same artifacts from another process, for ``user`` and ``s3cret`` only. Yields its host and port."""
        passwords = self._directory.with_suffix(".htpasswd")
        passwords.write_text("user:$2y$05$abcdefghijklmnopqrstuuLK7U1u6pVRmL7L1BBM2aS35PSZnDXlK\n")
        (port,) = free_ports(1)
        with self._serving(port, {"auth": {"htpasswd": {"realm": "models", "path": str(passwords)}}}):
            yield f"127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def push(self, repository: str, tag: str, files: Mapping[str, bytes]) -> str:
        """As oras pushes: a layer for each file, titled. Returns the manifest's digest."""
        layers = [{**self._blob(repository, data), "annotations": {TITLE: name}} for name, data in files.items()]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": "application/vnd.example.model",
            "config": {**self._blob(repository, b"{}"), "mediaType": "application/vnd.oci.empty.v1+json"},
            "layers": layers,
        }
        url = f"http://{self.host}/v2/{repository}/manifests/{tag}"
        text = json.dumps(manifest).encode()
        httpx.put(url, content=text, headers={"content-type": MANIFEST}).raise_for_status()
        return f"sha256:{hashlib.sha256(text).hexdigest()}"

    def _blob(self, repository: str, data: bytes) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        started = httpx.post(f"http://{self.host}/v2/{repository}/blobs/uploads/")
        place = httpx.URL(started.headers["location"]).copy_merge_params({"digest": digest})
        httpx.put(place, content=data, headers={"content-type": "application/octet-stream"}).raise_for_status()
        return {"mediaType": "application/octet-stream", "digest": digest, "size": len(data)}

    def stored(self, data: bytes) -> Path:
        """Where the registry keeps a blob: to damage it behind its back."""
        digest = hashlib.sha256(data).hexdigest()
        return self._directory / f"docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data"


MANIFEST = "application/vnd.oci.image.manifest.v1+json"
TITLE = "org.opencontainers.image.title"
