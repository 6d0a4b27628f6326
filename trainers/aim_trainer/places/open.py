"""From a URI to its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from aim_trainer.errors import StoreError

from .directory import Directory
from .patience import PATIENCE_S
from .place import Place

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,62}")


def open_place(uri: str, patience_s: float = PATIENCE_S) -> Place:
    """A path, file://, s3://BUCKET[/PREFIX], or http(s)://HOST/PATH (read only). Nothing is asked or made yet.

    patience_s: how long a place that is away is tried again. Raises StoreError.
    """
    found = _SCHEME.match(uri)
    scheme = found.group(1).lower() if found else ""
    _refuse_control_characters(uri)
    if scheme in ("", "file"):
        return Directory(_local(uri, scheme))
    if scheme == "s3":
        return _s3(uri, patience_s)
    if scheme in ("http", "https"):
        return _web(uri, patience_s)
    return _refuse(uri, f"{scheme}:// is not read or written here")


def open_file(uri: str, patience_s: float = PATIENCE_S) -> tuple[Place, str]:
    """The place that a file lies in, and its name there. Raises StoreError."""
    found = _SCHEME.match(uri)
    scheme = found.group(1).lower() if found else ""
    _refuse_control_characters(uri)
    if scheme in ("", "file"):
        path = _local(uri, scheme)
        return Directory(path.parent), path.name
    head, mark, query = uri.partition("?") if scheme.startswith("http") else (uri, "", "")
    parent, _, name = head.rpartition("/")
    if not name or parent.endswith(":/"):
        _refuse(uri, "no file is named")
    return open_place(f"{parent}{mark}{query}", patience_s), name


def _refuse_control_characters(uri: str) -> None:
    if not uri or any(ord(char) < 32 for char in uri):
        _refuse(uri, "empty, or with control characters")


def _local(uri: str, scheme: str) -> Path:
    if not scheme:
        return Path(uri).absolute()
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path:
        _refuse(uri, "a file: URI has no host; give file:///DIRECTORY")
    path = unquote(parts.path)
    _refuse_control_characters(path)
    return Path(path)


def _s3(uri: str, patience_s: float) -> Place:
    from .remote import Remote, s3

    bucket, _, key = uri.partition("://")[2].partition("/")
    key = key.strip("/")
    if not _BUCKET.fullmatch(bucket) or ".." in key.split("/"):
        _refuse(uri, "give s3://BUCKET/PREFIX")
    root = f"{bucket}/{key}".rstrip("/")
    return Remote(s3(patience_s), f"s3://{root}", root, patience_s)


def _web(uri: str, patience_s: float) -> Place:
    from .remote import Remote, web

    root, mark, query = uri.partition("?")
    root = root.rstrip("/")
    parts = urlsplit(root)
    if not parts.netloc or parts.username is not None:
        _refuse(uri.partition("?")[0], "give https://HOST/PATH, without a password in it")
    return Remote(web(), root, root, patience_s, mark + query)


def _refuse(uri: str, why: str) -> NoReturn:
    shown = re.sub(r"//[^/]*@", "//…@", uri.partition("?")[0])[:200]
    remedy = "give a path, file:///DIRECTORY, s3://BUCKET/PREFIX or https://HOST/PATH"
    raise StoreError(f"{shown!r}: {why}", field="uri", value=shown, remedy=remedy)
