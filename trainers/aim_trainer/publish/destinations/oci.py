"""A repository of an OCI registry: a version is a tag on a manifest whose layers are the files, as `oras push` has it.

The manifest is sent last and whole, so there are no torn versions. A registry puts a tag anew for whoever asks, so a
number is claimed first, by a tag of its own (`v3.claim-MARK`), which goes when the registry allows deletion.
Credentials are those of `docker login`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests
from oras.auth import AuthenticationException
from oras.provider import Registry

from aim_trainer.errors import StoreError
from aim_trainer.publish.versions import COMMIT, Commit, name_of, number_of

from .claims import claimed

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_EMPTY = "application/vnd.oci.empty.v1+json"
_LAYER = "application/octet-stream"
#: What is in it: `oras discover` and registries' pages show it.
_ARTIFACT = "application/vnd.aim.model.v1"
_TITLE = "org.opencontainers.image.title"
_CONTENT = "com.amd.aim.content-digest"
_CLAIM = ".claim-"
_HERE = ("localhost", "127.0.0.1", "[::1]")
#: Without oras' own attempts: two minutes of pauses, for a missing password, too.
_DO_REQUEST = inspect.unwrap(Registry.do_request)
_ANSWERS_WITHIN_S = (10, 30)  # its connection, its answer
#: Before each attempt. While another publisher writes what is asked for, docker-registry answers 500, or 400 to a
#: manifest that names it.
_PAUSES_S = (0.0, 0.1, 0.2, 0.4, 0.8)
_GONE = (requests.exceptions.RequestException, OSError)


class Oci:
    """oci://HOST/REPOSITORY. A registry on this machine is spoken to without TLS, as Docker does."""

    def __init__(self, location: str) -> None:
        host, _, repository = location.partition("/")
        self._location = location
        insecure = host.rpartition(":")[0] in _HERE or host in _HERE
        self._base = f"http{'' if insecure else 's'}://{host}/v2/{repository}"
        self._registry = Registry(hostname=host, insecure=insecure, auth_backend=self._backend(host, insecure))
        with suppress(ValueError, TypeError, KeyError, AttributeError, OSError):  # oras trusts docker's file
            self._registry.auth.load_configs(self._registry.get_container(location))

    def _backend(self, host: str, insecure: bool) -> str:
        """How the registry wants to know who asks: oras does not tell a Basic challenge from one for a token."""
        with (
            self._errors(),
            requests.get(
                f"http{'' if insecure else 's'}://{host}/v2/", timeout=_ANSWERS_WITHIN_S, stream=True
            ) as answer,
        ):
            return "basic" if answer.headers.get("WWW-Authenticate", "").lower().startswith("basic") else "token"

    def uri(self, number: int) -> str:
        return f"oci://{self._location}:{name_of(number)}"

    def check(self) -> None:
        self._tags()
        begun = self._ask("POST", "blobs/uploads/", accepted=(202,))
        place = requests.compat.urljoin(begun.url, begun.headers["Location"])
        self._ask("DELETE", place, accepted=(204, 400, 404, 405))  # what does not end uploads lets them lapse

    def published(self) -> dict[int, str | None]:
        whole = set(self._tags())
        begun = {number for tag in whole if (number := number_of(tag.partition(_CLAIM)[0])) is not None}
        return {number: self._digest(name_of(number)) if name_of(number) in whole else None for number in begun}

    def add(self, number: int, files: Path, commit: Commit) -> bool:
        with claimed(self, number) as alone:
            if not alone or name_of(number) in self._tags():
                return False
            layers = [self._file(files / path, path, sha256, size) for path, (sha256, size) in commit.files.items()]
            layers.append(self._blob(commit.text().encode(), COMMIT))
            self._put(name_of(number), layers, {_CONTENT: commit.digest})
        self._put("latest", layers, {_CONTENT: commit.digest})
        return True

    def marks(self, number: int) -> list[str]:
        prefix = f"{name_of(number)}{_CLAIM}"
        return [tag.removeprefix(prefix) for tag in self._tags() if tag.startswith(prefix)]

    def leave(self, number: int, mark: str) -> None:
        # The mark makes the manifest unlike any other: removing it by its digest removes nothing else.
        self._put(f"{name_of(number)}{_CLAIM}{mark}", [self._blob(b"{}", "claim")], {"com.amd.aim.claim": mark})

    def take_back(self, number: int, mark: str) -> None:
        tag = f"{name_of(number)}{_CLAIM}{mark}"
        found = self._ask("HEAD", f"manifests/{tag}", headers={"Accept": _MANIFEST}, accepted=(200, 404))
        if digest := found.headers.get("Docker-Content-Digest"):
            # 405: a registry that deletes nothing keeps the tag, and its number stays taken, as it is anyhow.
            self._ask("DELETE", f"manifests/{digest}", accepted=(202, 400, 403, 404, 405))

    def _tags(self) -> list[str]:
        tags: list[str] = []
        path = "tags/list?n=1000"
        while True:
            answer = self._ask("GET", path, accepted=(200, 404))
            if answer.status_code == 404:
                return tags
            page = self._object(answer).get("tags") or []
            tags += page
            if "next" not in answer.links or not page:
                return tags
            path = f"tags/list?n=1000&last={page[-1]}"

    def _digest(self, tag: str) -> str | None:
        """None: an artifact that somebody else put there."""
        manifest = self._object(self._ask("GET", f"manifests/{tag}", headers={"Accept": _MANIFEST}))
        found = (manifest.get("annotations") or {}).get(_CONTENT)
        return found if isinstance(found, str) else None

    def _put(self, tag: str, layers: list[dict[str, Any]], annotations: Mapping[str, str]) -> None:
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "artifactType": _ARTIFACT,
            "config": {**self._blob(b"{}", ""), "mediaType": _EMPTY, "annotations": {}},
            "layers": layers,
            "annotations": dict(annotations),
        }
        text = json.dumps(manifest).encode()
        self._ask("PUT", f"manifests/{tag}", data=text, headers={"Content-Type": _MANIFEST}, accepted=(201, 202))

    def _blob(self, data: bytes, title: str) -> dict[str, Any]:
        sha256 = hashlib.sha256(data).hexdigest()
        if not self._has(sha256):
            self._send(data, sha256, len(data))
        return _layer(title, sha256, len(data))

    def _file(self, file: Path, title: str, sha256: str, size: int) -> dict[str, Any]:
        if not self._has(sha256):
            with file.open("rb") as opened:
                self._send(opened, sha256, size)
        return _layer(title, sha256, size)

    def _has(self, sha256: str) -> bool:
        found = self._ask("HEAD", f"blobs/sha256:{sha256}", accepted=(200, 404))
        return int(found.status_code) == 200

    def _send(self, data: Any, sha256: str, size: int) -> None:
        """oras' own reads the whole file into memory; requests streams what is open."""
        begun = self._ask("POST", "blobs/uploads/", accepted=(202,))
        place = requests.compat.urljoin(begun.url, begun.headers["Location"])
        url = f"{place}{'&' if '?' in place else '?'}digest=sha256:{sha256}"
        headers = {"Content-Type": _LAYER, "Content-Length": str(size)}
        self._ask("PUT", url, data=data, headers=headers, accepted=(201,))

    def _object(self, answer: requests.Response) -> dict[str, Any]:
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            where = f"oci://{self._location}"
            raise StoreError(f"{where}: the registry answers what a registry does not", field=where)
        return found

    def _ask(
        self,
        method: str,
        path: str,
        *,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
        accepted: tuple[int, ...] = (200,),
    ) -> requests.Response:
        url = path if path.startswith("http") else f"{self._base}/{path}"
        streamed = data is not None and not isinstance(data, bytes)
        for pause_s in (0.0,) if streamed else _PAUSES_S:
            time.sleep(pause_s)
            with self._errors():
                answer: requests.Response = _DO_REQUEST(
                    self._registry, url, method, data=data, headers=dict(headers or {})
                )
            if answer.status_code in (*accepted, 401, 403):
                break
        if answer.status_code not in accepted:
            where = f"oci://{self._location}"
            why = f"{where}: {method} {path.partition('?')[0]} was answered {answer.status_code}"
            raise StoreError(why, field=where, remedy="check the name, and that you may push there (docker login)")
        return answer

    @contextmanager
    def _errors(self) -> Iterator[None]:
        where = f"oci://{self._location}"
        try:
            yield
        except (AuthenticationException, AttributeError) as error:  # Attribute…: BasicAuth without one
            why = f"{where}: the registry wants credentials"
            raise StoreError(
                why, field=where, remedy="log in: docker login, so that ~/.docker/config.json has them"
            ) from error
        except _GONE as error:
            why = f"{where}: cannot be reached ({type(error).__name__})"
            raise StoreError(why, field=where, remedy="check the registry's address and publish again") from error
        except ValueError as error:
            why = f"{where}: the registry wants credentials"
            raise StoreError(
                why, field=where, remedy="log in: docker login, so that ~/.docker/config.json has them"
            ) from error


def _layer(title: str, sha256: str, size: int) -> dict[str, Any]:
    return {"mediaType": _LAYER, "digest": f"sha256:{sha256}", "size": size, "annotations": {_TITLE: title}}
