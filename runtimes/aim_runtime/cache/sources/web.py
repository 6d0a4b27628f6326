"""Models by HTTP: files, and directories whose index page lists them. Also the client of what else speaks HTTP.

Pages and bytes come by requests of our own: fsspec reads an index page however long it is, and its range requests have
no If-Range, so a file that changed between two of them would be put together from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from html.parser import HTMLParser
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import requests
import requests.adapters
import urllib3.exceptions

from aim_runtime.cache.errors import CacheError, Changed, Transient
from aim_runtime.cache.source import CHUNK_BYTES, Listing, RemoteFile
from aim_runtime.cache.uri import ModelUri, safe_path

_CONNECT_S = 10
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_AS_IT_IS = {"Accept-Encoding": "identity"}  # sizes, ranges and digests are of the file's own bytes
_MOST_INDEX_BYTES, _MOST_PAGES, _DEEPEST = 8 * 2**20, 1000, 4
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
        linked = self._linked()
        if not linked:
            raise CacheError(f"{self._uri.text}: its index page lists no file: give the address of a file")
        return Listing("", tuple(self._probe(name, url) for name, url in sorted(linked.items())))

    def _linked(self) -> dict[str, str]:
        """Relative path → address, of what lies below the directory."""
        base = urlsplit(self._uri.location)
        pages, found, read = [self._uri.location], dict[str, str](), set[str]()
        while pages:
            page = pages.pop()
            if page in read or len(read) == _MOST_PAGES:
                continue
            read.add(page)
            for url in self._links(page):
                below = _below(base, url)
                if below.endswith("/"):
                    pages += [url] if below.count("/") < _DEEPEST else []
                elif below:
                    found[safe_path(below, self._uri.text)] = url
        return found

    def _links(self, page: str) -> list[str]:
        """What a page links to. Raises CacheError: it is too long to be an index."""
        with closing(self._get(page, {})) as answer, transport_errors(self._uri.text):
            check_status(answer, f"{self._uri.text}: index page", _NO_CREDENTIALS)
            text = answer.raw.read(_MOST_INDEX_BYTES + 1, decode_content=True)
        if len(text) > _MOST_INDEX_BYTES:
            raise CacheError(f"{self._uri.text}: its index page is longer than {_MOST_INDEX_BYTES} bytes: is it one?")
        anchors = _Anchors()
        anchors.feed(text.decode("utf-8", "replace"))
        found = []
        for link in anchors.links:
            with suppress(ValueError):  # no URL
                found.append(urljoin(page, link))
        return found

    def _probe(self, name: str, url: str) -> RemoteFile:
        with closing(self._get(url, {"Range": "bytes=0-"})) as answer:
            total = _total(answer)
            if answer.status_code != 416 or total != 0:  # no range of an empty file can be had (nginx, S3)
                check_status(answer, f"{self._uri.text}: {name}", _NO_CREDENTIALS)
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


class _Anchors(HTMLParser):
    """Where a page's links go to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]


def _below(base: SplitResult, url: str) -> str:
    """The path of ``url`` relative to ``base``; empty: it is somewhere else, or a page's own (to sort it)."""
    with suppress(ValueError):
        parts = urlsplit(url)
        directory, path = unquote(base.path), unquote(parts.path)
        here = (parts.scheme, parts.netloc.lower()) == (base.scheme, base.netloc.lower())
        if here and path.startswith(directory) and not parts.query and not parts.fragment:
            return path[len(directory) :]
    return ""


@contextmanager
def transport_errors(whose: str) -> Iterator[None]:
    """What ``requests`` raises as ours. Its messages hold whole addresses, signatures among them: they are left out."""
    try:
        yield
    except ValueError as error:  # InvalidSchema, InvalidURL, and what urllib says of an address
        raise CacheError(f"{whose}: redirects to what is no address of HTTP") from error
    except (requests.exceptions.SSLError, requests.exceptions.TooManyRedirects) as error:
        raise CacheError(f"{whose}: {type(error).__name__}") from error
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        raise Transient(f"{whose}: cannot be reached ({type(error).__name__})") from error
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Transient(f"{whose}: broke off ({type(error).__name__})") from error


def check_status(answer: requests.Response, whose: str, credentials: str) -> None:
    """Raises Transient, Changed or CacheError: it is not what was asked for."""
    status, packed = answer.status_code, answer.headers.get("Content-Encoding", "identity")
    if status in (200, 206) and packed.lower() != "identity":
        raise CacheError(f"{whose}: the server sends it compressed ({packed[:20]!r}), not the file's own bytes")
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
    if answer.status_code in (206, 416):
        said = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(said) if said.isascii() and said.isdigit() else None
