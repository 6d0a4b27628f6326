"""Debian's docker-registry, real: its storage in a directory, with or without a password."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urljoin

import requests

from ports import free_ports
from rclone_servers import process

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
TITLE = "org.opencontainers.image.title"


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
        requests.put(url, data=text, headers={"content-type": MANIFEST}, timeout=30).raise_for_status()
        return f"sha256:{hashlib.sha256(text).hexdigest()}"

    def _blob(self, repository: str, data: bytes) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        started = requests.post(f"http://{self.host}/v2/{repository}/blobs/uploads/", timeout=30)
        place = f"{urljoin(started.url, started.headers['location'])}&digest={digest}"
        requests.put(
            place, data=data, headers={"content-type": "application/octet-stream"}, timeout=30
        ).raise_for_status()
        return {"mediaType": "application/octet-stream", "digest": digest, "size": len(data)}

    def stored(self, data: bytes) -> Path:
        """Where the registry keeps a blob: to damage it behind its back."""
        digest = hashlib.sha256(data).hexdigest()
        return self._directory / f"docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data"
