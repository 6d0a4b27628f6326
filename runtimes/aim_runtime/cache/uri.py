"""Where a model comes from, and which names are safe: pure, and nothing of it touches a disk or a network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from aim_runtime.cache.errors import CacheError

Scheme = Literal["file", "http", "https", "s3", "hf", "oci"]
SCHEMES: tuple[Scheme, ...] = ("file", "http", "https", "s3", "hf", "oci")

_MOST_OF_A_PART, _MOST_OF_A_PATH = 255, 1024  # bytes; NAME_MAX, and what leaves room below any mount point
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_NAME_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"{_NAME_PART}(/{_NAME_PART}){{0,3}}")
_HF = re.compile(rf"({_NAME_PART}/{_NAME_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
# https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests
_OCI_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_OCI = re.compile(
    rf"(?P<host>[A-Za-z0-9.-]+(?::[0-9]{{1,5}})?)/(?P<repository>{_OCI_PART}(?:/{_OCI_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>.+))?"
)
_SHA256 = re.compile(r"sha256:([0-9a-f]{64})")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,62}")


@dataclass(frozen=True, slots=True)
class ModelUri:
    """A source. ``text``: canonical, without anything secret, what the index knows it by. ``location``: what is asked
    for there. ``revision``: branch, commit, tag or digest; empty: what is current. ``name``: the id it gets by itself.
    """

    scheme: Scheme
    text: str
    location: str
    revision: str
    name: str


def parse_uri(given: str) -> ModelUri:
    """``hf://org/name@main``, ``s3://bucket/prefix``, ``https://…``, ``oci://host/repo:tag``, ``file:///…``, a path.

    Raises:
        CacheError: no such scheme, or nothing of that form.
    """
    if not given or any(ord(char) < 32 or ord(char) == 127 for char in given):
        raise CacheError(f"source {_shown(given)!r}: empty, or with control characters; give {_ways()}")
    if not _is_text(given):
        raise CacheError(f"source {_shown(given)!r}: not UTF-8; give {_ways()}")
    found = _SCHEME.match(given)
    if found is None:
        return _file(given, given)
    scheme, rest = found.group(1).lower(), given[found.end() :]
    if scheme == "file":
        return _file(given, _path_of(given))
    if scheme in ("http", "https"):
        return _web(given)
    for known, read in (("s3", _s3), ("hf", _hf), ("oci", _oci)):
        if scheme == known:
            return read(given, rest)
    raise CacheError(f"source {_shown(given)}: {scheme}:// is not known; give {_ways()}")


def _ways() -> str:
    return "a path, file://, http(s)://, s3://BUCKET/PREFIX, hf://ORG/NAME[@REVISION] or oci://REGISTRY/REPOSITORY:TAG"


def _shown(given: str) -> str:
    """Without what may be secret: a query, or a user and a password."""
    return re.sub(r"//[^/]*@", "//…@", given.partition("?")[0])[:200]


def _is_text(given: str) -> bool:
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


def _path_of(given: str) -> str:
    try:
        parts = urlsplit(given)
    except ValueError:
        raise CacheError(f"source {_shown(given)}: not a URL; give file:///DIRECTORY") from None
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise CacheError(f"source {_shown(given)}: a file: source has no host; give file:///DIRECTORY")
    return unquote(parts.path)


def _file(given: str, path: str) -> ModelUri:
    if "\0" in path:
        raise CacheError(f"source {given!r}: a path holds no NUL")
    place = Path(path).absolute()
    return ModelUri("file", f"file://{quote(str(place))}", str(place), "", name_from(place.name))


def _web(given: str) -> ModelUri:
    try:
        parts = urlsplit(given)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise CacheError(f"source {_shown(given)}: not a URL; give https://HOST/PATH") from None
    if not host or parts.path in ("", "/"):
        raise CacheError(
            f"source {_shown(given)}: give https://HOST/PATH of a file, or of a directory with a / at its end"
        )
    if parts.username is not None or parts.password is not None:
        raise CacheError(f"source {_shown(given)}: credentials in a URL end up in logs: put them into ~/.netrc")
    scheme: Scheme = "https" if parts.scheme.lower() == "https" else "http"
    text = urlunsplit((scheme, parts.netloc.lower(), parts.path, "", ""))  # a signed URL's query is a secret
    location = urlunsplit((scheme, parts.netloc, parts.path, parts.query, ""))
    return ModelUri(scheme, text, location, "", name_from(unquote(parts.path.rstrip("/").rpartition("/")[2])))


def _s3(given: str, rest: str) -> ModelUri:
    bucket, _, key = rest.partition("/")
    if not _BUCKET.fullmatch(bucket) or not key.strip("/") or "?" in rest or "#" in rest:
        raise CacheError(f"source {_shown(given)}: give s3://BUCKET/PREFIX, or s3://BUCKET/KEY.gguf")
    key = key.strip("/")
    return ModelUri("s3", f"s3://{bucket}/{key}", f"{bucket}/{key}", "", name_from(key.rpartition("/")[2]))


def _hf(given: str, rest: str) -> ModelUri:
    found = _HF.fullmatch(rest)
    if found is None or ".." in rest:
        raise CacheError(f"source {_shown(given)}: give hf://ORG/NAME or hf://ORG/NAME@REVISION")
    repository, revision = found.group(1), found.group(2) or ""
    revision = "" if revision == "main" else revision  # the same, said
    text = f"hf://{repository}@{revision}" if revision else f"hf://{repository}"
    return ModelUri("hf", text, repository, revision, checked_name(repository))


def _oci(given: str, rest: str) -> ModelUri:
    found = _OCI.fullmatch(rest)
    if found is None:
        raise CacheError(f"source {_shown(given)}: give oci://REGISTRY/REPOSITORY:TAG or …@sha256:DIGEST")
    digest = found["digest"]
    if digest is not None:
        sha256_of(digest, _shown(given))
    revision = digest or found["tag"] or "latest"
    location = f"{found['host']}/{found['repository']}"
    mark = "@" if digest else ":"
    name = "/".join(found["repository"].split("/")[-4:])
    return ModelUri("oci", f"oci://{location}{mark}{revision}", location, revision, checked_name(name))


def sha256_of(digest: object, whose: str) -> str:
    """The 64 hexadecimal digits of ``sha256:…``. Raises CacheError: anything else, ``../`` among it."""
    found = _SHA256.fullmatch(digest) if isinstance(digest, str) else None
    if found is None:
        raise CacheError(f"{whose}: {str(digest)[:100]!r} is not a digest: sha256: and 64 hexadecimal digits")
    return found.group(1)


def safe_path(given: object, whose: str) -> str:
    """A relative path with ``/`` that stays in the directory it is put into, on any file system.

    Raises:
        CacheError: ``..``, absolute, empty, too long, or with characters that no model's file has.
    """
    text = given if isinstance(given, str) else ""
    parts = text.split("/")
    wrong = (
        not _is_text(text)
        or "\\" in text
        or any(ord(char) < 32 or ord(char) == 127 for char in text)
        or any(part in ("", ".", "..") or len(part.encode()) > _MOST_OF_A_PART for part in parts)
        or len(text.encode()) > _MOST_OF_A_PATH
    )
    if wrong:
        raise CacheError(
            f"{whose}: the file name {str(given)[:100]!r} is refused: it would not stay in the model's directory"
        )
    return text


def checked_name(name: str) -> str:
    """A model's id, as in ``org/model``: also its directory below the cache. Raises CacheError."""
    if not _NAME.fullmatch(name) or "--" in name or name.partition("/")[0] == "hub":
        raise CacheError(
            f"name {name[:100]!r}: letters, digits, '.', '_' and '-' in one to four parts, as in org/model (not '--', "
            "nor 'hub', which is Hugging Face's): give --name"
        )
    return name


def name_from(last: str) -> str:
    """An id from the last part of an address; may be no good, which :func:`checked_name` says when it is used."""
    stem = re.sub(r"\.gguf$", "", last, flags=re.IGNORECASE)
    return re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9._-]", "-", stem)).lstrip("._-")[:96]
