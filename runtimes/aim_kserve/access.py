"""One JSON line per request, a request id for everybody, and W3C trace context carried on.

Pure ASGI and a few microseconds a request: it stands in front of every route.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import orjson
from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aim_kserve.client_address import Proxies
from aim_kserve.redacted import redacted

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
#: https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")

#: https://www.w3.org/TR/trace-context/#tracestate-limits: 512 characters should be carried on; longer is not.
_TRACESTATE_BYTES = 4096


@dataclass(slots=True)
class RequestLog:
    """What is known of one request; handlers add to ``fields`` (model, tokens, verdict …).

    ``trace_id``/``span_id`` are W3C hex ids. ``parent_id`` is the caller's span, None where the trace starts here.
    ``tracestate``: what the caller's tracing systems said beside it. ``spans``: how many were made of this request.
    ``client``: the caller's address, None where it is not known.
    ``headers``: further headers of the answer (gRPC: trailing metadata), whatever it is; names are lower-case.
    ``client_left``: the client did not wait for its answer; logged as status 499 where none had begun.
    """

    request_id: str
    trace_id: str
    span_id: str
    parent_id: str | None
    flags: str
    fields: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    client_left: bool = False
    client: str | None = None
    tracestate: str = ""
    spans: int = 0

    @property
    def traceparent(self) -> str:
        """The header to send on: same trace, our span as the parent."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    @property
    def unique_id(self) -> str:
        """An id that no other request has, even where a client repeats its ``x-request-id`` or ``traceparent``."""
        ours = self.parent_id is None and self.request_id == self.trace_id
        return self.request_id if ours else f"{self.request_id}-{self.span_id}"

    def add(self, **counts: int) -> None:
        """Add to counting fields: one request of ours may be several of the engine's."""
        for name, count in counts.items():
            self.fields[name] = self.fields.get(name, 0) + count


_current: ContextVar[RequestLog | None] = ContextVar("aim.log", default=None)


def current_log() -> RequestLog:
    """The log of the request being served, for code that KServe calls without a scope; a fresh one outside any."""
    log = _current.get()
    return log if log is not None else open_log([])


def log_if_any() -> RequestLog | None:
    """The log of the request being served, None outside any."""
    return _current.get()


def open_log(headers: list[tuple[bytes, bytes]]) -> RequestLog:
    """Take the caller's ``x-request-id`` and ``traceparent`` where they are well-formed, else make new ones."""
    request_id = trace = state = b""
    for key, value in headers:
        if key == b"x-request-id":
            request_id = value
        elif key == b"traceparent":
            trace = value
        elif key == b"tracestate":
            state = b",".join(filter(None, (state, value)))
    given = request_id.decode("latin-1")
    made = os.urandom(24).hex()
    span_id = made[:16]
    match = _TRACEPARENT.fullmatch(trace.decode("latin-1")) if trace else None
    if match and match[1] != "ff" and match[2] != "0" * 32 and match[3] != "0" * 16:
        trace_id, parent_id, flags = match[2], match[3], match[4]
    else:
        trace_id, parent_id, flags = made[16:], None, "00"
    request = given if _REQUEST_ID.fullmatch(given) and redacted(given) == given else trace_id
    log = RequestLog(request, trace_id, span_id, parent_id, flags)
    if parent_id is not None and len(state) <= _TRACESTATE_BYTES:
        log.tracestate = redacted(state.decode("latin-1"))
    _current.set(log)
    return log


_PROBES = frozenset({"/", "/metrics", "/health", "/healthz", "/ping", "/readyz"})


def _is_probe(path: str) -> bool:
    return path in _PROBES or path.startswith(("/v2/health/", "/readyz/")) or path.endswith("/ready")


def log_of(scope: Scope) -> RequestLog:
    """The log of the request that ``scope`` belongs to."""
    log: RequestLog = scope["aim.log"]
    return log


_LOST = Counter("access_log_lost_lines", "Access log lines that stdout did not take: it is full, or nobody reads it")


def write_line(line: bytes) -> None:
    """Default sink: stdout, one write per line so that lines of threads never mix.

    A line that cannot be written is lost and counted, and the next one is tried again: no request fails for its log.
    Unbuffered, because a buffer would keep the line and fail once more when the process ends.
    """
    try:
        write_all(line)
    except (OSError, ValueError):  # full, closed by its reader; closed here
        _LOST.inc()


def write_all(line: bytes) -> None:
    """All of ``line`` to stdout. Raises OSError or ValueError where it does not take it."""
    descriptor = sys.stdout.fileno() if sys.stdout is not None else -1
    while line:
        line = line[os.write(descriptor, line) :]


class AccessLog:
    """ASGI middleware: opens a RequestLog, answers ``x-request-id``, writes the line when the response ends.

    Probes (``/``, ``/metrics``, ``/health``, ``/healthz``, ``/readyz``, ``/ping``, ``/v2/health/…``, ``…/ready``) that
    succeed are not logged. ``proxies``: whose word counts for where a request came from.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        enabled: bool = True,
        write: Callable[[bytes], None] = write_line,
        proxies: Proxies | None = None,
    ) -> None:
        self.app = app
        self.enabled = enabled
        self.write = write
        self._proxies = proxies or Proxies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        log = scope["aim.log"] = open_log(scope["headers"])
        address = scope.get("client")
        log.client = self._proxies.client(address[0], scope["headers"]) if address else None
        started = time.perf_counter()
        status, first_byte_at, complete = 500, 0.0, False
        request_id = log.request_id.encode("latin-1")

        async def send_logged(message: Message) -> None:
            nonlocal status, first_byte_at, complete
            if message["type"] == "http.response.start":
                status, first_byte_at = message["status"], time.perf_counter()
                headers = [item for item in message.get("headers", ()) if item[0] != b"x-request-id"]
                more = [(name.encode(), value.encode()) for name, value in log.headers.items()] if log.headers else ()
                message["headers"] = [*headers, *more, (b"x-request-id", request_id)]
            elif not message.get("more_body", False):
                complete = True
            await send(message)

        try:
            await self.app(scope, receive, send_logged)
        finally:
            if self.enabled and not (status < 400 and _is_probe(scope["path"])):
                self.write(
                    access_line(
                        log,
                        started,
                        client=log.client,
                        method=scope["method"],
                        path=scope["path"],
                        status=499 if log.client_left and not first_byte_at else status,
                        complete=complete,
                        first_byte_ms=round((first_byte_at - started) * 1e3, 3) if first_byte_at else None,
                    )
                )


def access_line(log: RequestLog, started: float, *, path: str, **known: Any) -> bytes:
    """The JSON line of a request that ends now and began at ``started`` (``time.perf_counter()``)."""
    line = {
        "ts": time.time(),
        "request_id": log.request_id,
        "trace_id": log.trace_id,
        "span_id": log.span_id,
        "parent_id": log.parent_id,
        "duration_ms": round((time.perf_counter() - started) * 1e3, 3),
        "path": redacted(path),
        **known,
        **log.fields,
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE, default=str)
