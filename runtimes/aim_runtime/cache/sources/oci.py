"""Models in an OCI registry, as ``oras push`` puts them there: a manifest whose layers are files with titles.

oras speaks to the registry and finds the credentials (``~/.docker/config.json``). Its own download writes straight to
the target and compares nothing (0.2.43): the bytes come by range requests of our own and are verified like all others.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import requests
from oras.auth import AuthenticationException
from oras.provider import Registry

from aim_runtime.cache.errors import CacheError, Corrupt, Transient
from aim_runtime.cache.source import Listing, RemoteFile
from aim_runtime.cache.sources.web import check_status, ranged, session, transport_errors
from aim_runtime.cache.uri import ModelUri, safe_path, sha256_of

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_MOST_MANIFEST_BYTES = 4 * 2**20
#: Where a layer's file name stands: ORAS', and the CNCF model format's.
_TITLES = ("org.opencontainers.image.title", "org.cncf.model.filepath")
_UNPACK = "io.deis.oras.content.unpack"
_CREDENTIALS = "log in (docker login), so that ~/.docker/config.json knows the registry"
_HERE = ("localhost", "127.0.0.1", "[::1]")
#: Without oras' own attempts: two minutes of pauses, for a missing password, too. Ours are counted in one place.
_DO_REQUEST = inspect.unwrap(Registry.do_request)


class Oci:
    """An artifact by tag or digest. A registry on this machine is spoken to without TLS, as Docker does."""

    def __init__(self, uri: ModelUri, stall_s: float) -> None:
        host = uri.location.partition("/")[0]
        self._uri = uri
        insecure, self._session = host.rpartition(":")[0] in _HERE or host in _HERE, session(stall_s)
        backend = self._backend(f"http{'' if insecure else 's'}://{host}/v2/")
        self._registry = Registry(hostname=host, insecure=insecure, auth_backend=backend)
        self._registry.session = self._registry.auth.session = self._session
        mark = "@" if ":" in uri.revision else ":"
        self._container = self._registry.get_container(f"{uri.location}{mark}{uri.revision}")
        try:
            self._registry.auth.load_configs(self._container)
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:  # oras trusts what is in it
            raise CacheError(
                f"{uri.text}: ~/.docker/config.json cannot be read ({type(error).__name__}): {_CREDENTIALS}"
            ) from error

    def _backend(self, url: str) -> str:
        """How the registry wants to know who asks: oras does not tell a Basic challenge from one for a token."""
        try:
            with transport_errors(self._uri.text), closing(self._session.get(url, stream=True)) as answer:
                return "basic" if answer.headers.get("WWW-Authenticate", "").lower().startswith("basic") else "token"
        except Transient:
            return "token"  # the listing is what is tried again

    def listing(self) -> Listing:
        digest, manifest = self._manifest(self._uri.revision)
        if manifest.get("mediaType") == _INDEX or "manifests" in manifest:
            digest, manifest = self._manifest(self._only_one(manifest))
        layers = manifest.get("layers")
        if not isinstance(layers, list):
            raise CacheError(f"{self._uri.text}: its manifest lists no layers")
        files = [file for layer in layers if (file := self._file(layer)) is not None]
        if not files:
            raise CacheError(f"{self._uri.text}: no layer has a title: an image, not files that oras pushed")
        return Listing(digest, tuple(files))

    def _manifest(self, reference: str) -> tuple[str, dict[str, Any]]:
        """Its digest, and what it says. Raises Corrupt: it was asked for by another digest."""
        url = f"{self._registry.prefix}://{self._container.manifest_url(reference)}"
        whose = f"{self._uri.text}: manifest {reference}"
        with closing(self._get(url, {"Accept": f"{_MANIFEST}, {_INDEX}"})) as answer, transport_errors(whose):
            check_status(answer, whose, _CREDENTIALS)
            text = answer.raw.read(_MOST_MANIFEST_BYTES + 1, decode_content=True)
        if len(text) > _MOST_MANIFEST_BYTES:
            raise CacheError(f"{whose}: longer than {_MOST_MANIFEST_BYTES} bytes")
        digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
        if ":" in reference and reference != digest:
            raise Corrupt(f"{whose}: the registry sent {digest}")
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError):
            manifest = None
        if not isinstance(manifest, dict):
            raise CacheError(f"{whose}: is no JSON object")
        return digest, manifest

    def _only_one(self, index: Mapping[str, Any]) -> str:
        listed = index.get("manifests")
        found = listed if isinstance(listed, list) else []
        if len(found) != 1 or not isinstance(found[0], dict):
            raise CacheError(f"{self._uri.text}: an index of {len(found)} manifests: give the digest of one")
        return f"sha256:{sha256_of(found[0].get('digest'), self._uri.text)}"

    def _file(self, layer: object) -> RemoteFile | None:
        """None: a layer without a title. Raises CacheError: no such size, digest or title, or a packed folder."""
        known = layer if isinstance(layer, dict) else {}
        notes = known.get("annotations")
        notes = notes if isinstance(notes, dict) else {}
        title = next((notes[key] for key in _TITLES if key in notes), None)
        if title is None:
            return None
        path = safe_path(title, self._uri.text)
        sha256, size = sha256_of(known.get("digest"), f"{self._uri.text}: {path}"), known.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise CacheError(f"{self._uri.text}: {path}: its manifest gives no size")
        if str(notes.get(_UNPACK, "")).lower() == "true":
            raise CacheError(f"{self._uri.text}: {path} is a packed folder: push the files one by one")
        url = f"{self._registry.prefix}://{self._container.get_blob_url(f'sha256:{sha256}')}"
        return RemoteFile(path, size, url, digest=("sha256", sha256))

    def _get(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        answer = self._ask(url, headers)
        if answer.status_code == 401:  # oras keeps a token that has expired: minutes, where a model takes an hour
            answer.close()
            self._registry.auth.token = None
            answer = self._ask(url, headers)
        return answer

    def _ask(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        with transport_errors(self._uri.text):
            try:
                answer: requests.Response = _DO_REQUEST(self._registry, url, "GET", headers=dict(headers), stream=True)
            except (AuthenticationException, AttributeError, ValueError) as error:  # Attribute…: BasicAuth without one
                if isinstance(error, requests.exceptions.RequestException):
                    raise
                raise CacheError(f"{self._uri.text}: the registry wants credentials: {_CREDENTIALS}") from error
            return answer

    @contextmanager
    def read(self, file: RemoteFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        whose = f"{self._uri.text}: {file.path}"
        with ranged(lambda headers: self._get(file.locator, headers), file, offset, whose, _CREDENTIALS) as found:
            yield found
