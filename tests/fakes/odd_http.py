"""An HTTP server that cuts answers, changes files or has no ranges, as it is told; it remembers requests."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Odd:
    """files: path (without the query) → bytes. moved: path → where it is redirected to. cuts: so many answers end
    after ``cut_bytes`` and a silence of ``silent_s``. statuses: answered first, in that order. types: path → its type.
    heads: sent besides with each file, and instead of what is right. unsatisfiable: no range of an empty file is.
    """

    files: dict[str, bytes]
    moved: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    unsatisfiable: bool = False
    ranges: bool = True
    etags: bool = True
    cuts: int = 0
    cut_bytes: int = 0
    silent_s: float = 0
    statuses: list[int] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    odd: Odd
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        odd = self.odd
        path = self.path.partition("?")[0]
        asked = self.headers.get("Range")
        odd.requests.append((path, asked))
        odd.headers.append({key.lower(): value for key, value in self.headers.items()})
        if odd.statuses:
            self._empty(odd.statuses.pop(0))
        elif path in odd.moved:
            self._empty(302, location=odd.moved[path])
        elif path in odd.files:
            self._file(path, odd.files[path], asked)
        else:
            self._empty(404)

    def _empty(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _file(self, path: str, data: bytes, asked: str | None) -> None:
        etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        found = re.match(r"bytes=(\d+)-", asked or "") if self.odd.ranges else None
        ranged = found is not None and self.headers.get("If-Range", etag) == etag
        start = int(found[1]) if found is not None and ranged else 0
        if ranged and start >= len(data) and (data or self.odd.unsatisfiable):
            self._empty(416, **{"content-range": f"bytes */{len(data)}"})
            return
        self.send_response(206 if ranged else 200)
        if self.odd.etags:
            self.send_header("ETag", etag)
        self.send_header("Content-Type", self.odd.types.get(path, "application/octet-stream"))
        of = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if ranged else {}
        for name, value in {"Content-Length": str(len(data) - start), **of, **self.odd.heads}.items():
            self.send_header(name, value)
        self.end_headers()
        self._body(data[start:], probed=asked == "bytes=0-")

    def _body(self, body: bytes, *, probed: bool) -> None:
        if self.odd.cuts and len(body) > self.odd.cut_bytes and not probed:
            self.odd.cuts -= 1
            body, self.close_connection = body[: self.odd.cut_bytes], True
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            if self.close_connection:
                time.sleep(self.odd.silent_s)

    def log_message(self, *_: object) -> None: ...


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves in the middle is what it is tested with."""


@contextlib.contextmanager
def odd_http(odd: Odd) -> Iterator[Odd]:
    """Serves ``odd`` at ``odd.url``."""

    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"odd": odd}))
    odd.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield odd
    finally:
        server.shutdown()
        server.server_close()
