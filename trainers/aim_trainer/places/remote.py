"""S3 and what speaks its protocol, and files on web servers, by fsspec.

Credentials and endpoint are found as the AWS SDK does (`AWS_*` variables, `AWS_ENDPOINT_URL`, `~/.aws`, a role).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec

from aim_trainer.errors import StoreError

from .directory import local_error
from .patience import Away, patiently
from .place import Entry, checked

_CONNECT_S, _READ_S = 10, 30
#: What the three libraries below raise.
_ERRORS = (OSError, botocore.exceptions.BotoCoreError, aiohttp.ClientError)


def s3(patience_s: float) -> Any:
    """fsspec's file system. Its own attempts are one: ours are counted in one place."""
    files = fsspec.filesystem(
        "s3",
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": _CONNECT_S,
            "read_timeout": min(_READ_S, max(1.0, patience_s)),
            "retries": {"max_attempts": 1},
            # Many stores beside AWS' own know no checksum trailers.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    files.retries = 1
    return files


def web() -> Any:
    """fsspec's file system of HTTP."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
    return fsspec.filesystem("http", skip_instance_cache=True, client_kwargs={"timeout": timeout})


class Remote:
    """Objects below a key, or files below a URL (these are only read, by their names).

    files: fsspec's file system; root: bucket/key, or a URL; query: a signed URL's, never shown.
    """

    def __init__(self, files: Any, uri: str, root: str, patience_s: float, query: str = "") -> None:
        self._files, self._root, self._patience_s, self._query = files, root, patience_s, query
        self.uri = uri

    def at(self, name: str) -> Remote:
        name = checked(name, self.uri)
        return Remote(self._files, f"{self.uri}/{name}", f"{self._root}/{name}", self._patience_s, self._query)

    def path(self) -> None:
        return None

    def files(self) -> tuple[Entry, ...]:
        self._of_s3("listed")
        return tuple(sorted(self._ask(self._found, missing=())))

    def _found(self) -> tuple[Entry, ...]:
        found = self._files.find(self._root, detail=True)
        inside = f"{self._root}/"
        return tuple(
            Entry(checked(key.removeprefix(inside), self.uri), int(known["size"] or 0))
            for key, known in found.items()
            if known["type"] == "file" and key.startswith(inside) and key != inside
        )

    def folders(self) -> tuple[str, ...]:
        self._of_s3("listed")
        return tuple(sorted(self._ask(self._below, missing=())))

    def _below(self) -> tuple[str, ...]:
        inside = f"{self._root}/"
        found = self._files.ls(self._root, detail=True)
        names = (known["name"].rstrip("/").removeprefix(inside) for known in found if known["type"] == "directory")
        return tuple(checked(name, self.uri) for name in names if name)

    def exists(self, name: str) -> bool:
        key = self._key(name)
        return bool(self._ask(lambda: self._files.isfile(key), name=name))

    def read(self, name: str, into: Path) -> Path:
        key, part = self._key(name), into.with_name(f".unfinished-{uuid.uuid4().hex}")
        try:
            into.parent.mkdir(parents=True, exist_ok=True)
            self._ask(lambda: self._files.get_file(key, str(part)), name=name)
            part.replace(into)
        except OSError as error:
            raise local_error(into, error) from error
        finally:
            part.unlink(missing_ok=True)
        return into

    def read_bytes(self, name: str) -> bytes:
        key = self._key(name)
        data: bytes = self._ask(lambda: self._files.cat_file(key), name=name)
        return data

    def write(self, name: str, file: Path) -> None:
        key, size = self._to(name), file.stat().st_size
        self._ask(lambda: self._put(key, size, lambda: self._files.put_file(str(file), key)), name=name)

    def write_bytes(self, name: str, data: bytes) -> None:
        key = self._to(name)
        self._ask(lambda: self._put(key, len(data), lambda: self._files.pipe_file(key, data)), name=name)

    def _put(self, key: str, size: int, put: Callable[[], object]) -> None:
        put()
        if int(self._files.info(key)["size"]) != size:
            raise Away("what was written is not whole")

    def remove(self, name: str = "") -> None:
        self._of_s3("removed")
        key = self._key(name) if name else self._root
        for found in self._ask(lambda: self._files.find(key), missing=[]):
            self._ask(partial(self._files.rm_file, found), missing=None)

    def _key(self, name: str) -> str:
        return f"{self._root}/{checked(name, self.uri)}{self._query}"

    def _to(self, name: str) -> str:
        self._of_s3("written")
        return self._key(name)

    def _of_s3(self, done: str) -> None:
        if self._root.startswith("http"):
            raise StoreError(
                f"{self.uri}: nothing is {done} over HTTP", field=self.uri, remedy="name a file to read, or s3://"
            )

    def _ask(self, attempt: Callable[[], Any], name: str = "", **missing: Any) -> Any:
        """missing: what is returned where there is nothing; without it that is an error."""
        uri = f"{self.uri}/{name}" if name else self.uri

        def asked() -> Any:
            try:
                return attempt()
            except FileNotFoundError as error:
                if "missing" in missing:
                    return missing["missing"]
                raise StoreError(f"{uri}: no such bucket or file", field=uri, remedy="check the name") from error
            except _ERRORS as error:
                raise _ours(uri, error) from error

        return patiently(uri, self._patience_s, asked)


def _ours(uri: str, error: Exception) -> Exception:
    """What the libraries below raise, as ours. Their words may hold a signature, and are left out."""
    match error:
        case botocore.exceptions.NoCredentialsError() | botocore.exceptions.PartialCredentialsError():
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            return StoreError(f"{uri}: no credentials", field=uri, remedy=remedy)
        case PermissionError():
            remedy = "check AWS_ACCESS_KEY_ID and what it may read and write"
            return StoreError(f"{uri}: refused", field=uri, remedy=remedy)
        case botocore.exceptions.ParamValidationError():
            return StoreError(f"{uri}: not a name that S3 knows", field=uri, remedy="give s3://BUCKET/PREFIX")
        case aiohttp.ClientResponseError() if 400 <= error.status < 500 and error.status != 429:
            return StoreError(f"{uri}: answered {error.status}", field=uri, remedy="check the URL and who may read it")
        case botocore.exceptions.BotoCoreError() | aiohttp.ClientError() | TimeoutError():
            return Away(f"cannot be reached ({type(error).__name__})")
        case OSError() if error.filename and os.path.isabs(str(error.filename)):
            return local_error(error.filename, error)
        case OSError():
            return Away(f"broke off ({type(error).__name__})")
    return error
