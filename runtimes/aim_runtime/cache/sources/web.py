"""Models by HTTP: files, and directories whose index page lists them. Also the client of what else speaks HTTP.

fsspec lists; the bytes come by range requests of our own: fsspec's have no If-Range, so a file that changed between two
of them would be put together from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
import requests.adapters
import urllib3.exceptions

from aim_runtime.cache.errors import CacheError, Changed, Transient
from aim_runtime.cache.source import CHUNK_BYTES, Listing, RemoteFile
from aim_runtime.cache.uri import ModelUri, safe_path

_CONNECT_S = 10
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_AS_IT_IS = {"Accept-Encoding": "identity"}  # sizes, ranges and digests are of the file's own bytes
_NO_CREDENTIALS = "for credentials see ~/.netrc"

Get = Callable[[Mapping[str, str]], requests.Response]


class _Timed(requests.adapters.HTTPAdapter):  # type: ignore[misc]  # untyped where we check
    """Every request of a session has time limits, those of libraries that set none, too."""

    def __init__(self, stall_s: float) -> None:
        self._limits = (_CONNECT_S, stall_s)
        super().__init__(pool_maxsize=32)

    def send(self, request: Any, **kwargs: Any) -> Any:
        kwargs["timeout"] = self._limits
        return super().send(request, **kwargs)


def session(stall_s: float) -> requests.Session:
    """Proxies and ~/.netrc as ``requests`` finds them; a redirect to another host does not take credentials along."""
    made = requests.Session()
    for scheme in ("http://", "https://"):
        made.mount(scheme, _Timed(stall_s))
    return made


class Web:
    """A file, or with a ``/`` at its end the directory whose index page lists them."""

    def __init__(self, uri: ModelUri, stall_s: float) -> None:
        self._uri, self._session = uri, session(stall_s)

    def listing(self) -> Listing:
        if not urlsplit(self._uri.location).path.endswith("/"):
            name = unquote(urlsplit(self._uri.location).path.rpartition("/")[2])
            return Listing("", (self._probe(name, self._uri.location),))
        return Listing("", tuple(self._probe(name, url) for name, url in sorted(self._linked().items())))

    def _linked(self) -> dict[str, str]:
        """Relative path → address, of what lies below the directory."""
        import fsspec

        base = self._uri.location
        files = fsspec.filesystem("http", skip_instance_cache=True, client_kwargs={"trust_env": True})
        try:
            found = files.find(base, maxdepth=4)
        except Exception as error:
            raise Transient(f"{self._uri.text}: no index page ({type(error).__name__})") from error
        below = [url for url in found if url.startswith(base) and not url.endswith("/") and not {"?", "#"} & set(url)]
        return {unquote(url[len(base) :]): url for url in below}

    def _probe(self, name: str, url: str) -> RemoteFile:
        with closing(self._get(url, {"Range": "bytes=0-"})) as answer:
            check_status(answer, f"{self._uri.text}: {name}", _NO_CREDENTIALS)
            total = _total(answer)
            if total is None:
                raise CacheError(
                    f"{self._uri.text}: {name}: the server does not say how long it is: a cut would pass as whole"
                )
            return RemoteFile(safe_path(name, self._uri.text), total, url, validator=_validator(answer))

    def _get(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        with transport_errors(self._uri.text):
            return self._session.get(url, headers={**_AS_IT_IS, **headers}, stream=True)

    @contextmanager
    def read(self, file: RemoteFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        whose = f"{self._uri.text}: {file.path}"
        with ranged(lambda headers: self._get(file.locator, headers), file, offset, whose, _NO_CREDENTIALS) as found:
            yield found


@contextmanager
def transport_errors(whose: str) -> Iterator[None]:
    """What ``requests`` raises as ours. Its messages hold whole addresses, signatures among them: they are left out."""
    try:
        yield
    except (requests.exceptions.SSLError, requests.exceptions.TooManyRedirects) as error:
        raise CacheError(f"{whose}: {type(error).__name__}") from error
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        raise Transient(f"{whose}: cannot be reached ({type(error).__name__})") from error
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Transient(f"{whose}: broke off ({type(error).__name__})") from error


def check_status(answer: requests.Response, whose: str, credentials: str) -> None:
    """Raises Transient, Changed or CacheError: it is not what was asked for."""
    status = answer.status_code
    if status in (200, 206):
        return
    if status in _TRANSIENT:
        raise Transient(f"{whose}: the server answers {status}")
    if status in (412, 416):
        raise Changed(f"{whose}: is not as long as it was listed, or changed")
    if status in (401, 403):
        raise CacheError(f"{whose}: the server answers {status}: {credentials}")
    raise CacheError(f"{whose}: the server answers {status}{': no such file' if status in (404, 410) else ''}")


@contextmanager
def ranged(
    get: Get, file: RemoteFile, offset: int, whose: str, credentials: str
) -> Iterator[tuple[int, Iterator[bytes]]]:
    """``file`` from ``offset`` on, or from 0 where the server has no ranges.

    Raises:
        Changed: it has another validator, or is not as long, as was listed.
    """
    headers = dict(_AS_IT_IS)
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if file.validator and not file.validator.startswith("W/"):
            headers["If-Range"] = (
                file.validator
            )  # https://www.rfc-editor.org/rfc/rfc9110#name-if-range: strong ones only
    with closing(get(headers)) as answer:
        check_status(answer, whose, credentials)
        said = _validator(answer)
        if file.validator and said != file.validator and (said or answer.status_code == 200):
            raise Changed(f"{whose}: changed while it was fetched")
        if _total(answer) not in (None, file.size):
            raise Changed(f"{whose}: is {_total(answer)} bytes, {file.size} were listed")
        yield (_first_byte(answer, offset, whose), _body(answer, whose))


def _first_byte(answer: requests.Response, offset: int, whose: str) -> int:
    if answer.status_code == 200:
        return 0
    said = answer.headers.get("Content-Range", "")
    if not said.startswith(f"bytes {offset}-"):
        raise CacheError(f"{whose}: the server sent {said[:60]!r} for bytes from {offset} on")
    return offset


def _body(answer: requests.Response, whose: str) -> Iterator[bytes]:
    with transport_errors(whose):
        while data := answer.raw.read1(CHUNK_BYTES, decode_content=False):
            yield data


def _validator(answer: requests.Response) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _total(answer: requests.Response) -> int | None:
    said = answer.headers.get("Content-Length", "")
    if answer.status_code == 206:
        said = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(said) if said.isascii() and said.isdigit() else None
