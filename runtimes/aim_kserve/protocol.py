"""uvicorn's HTTP protocol for clients that do not finish what they begin, or offer what is not taken.

uvicorn waits for a request for ever: a client that sends a byte of its head now and then (slow loris), or none at all,
holds a connection, and a head may grow without an end. It closes connections from which it has not read all, which
resets them, so that clients do not see what they were told. It loses the body of a request that offers an upgrade
(Java's own client offers HTTP/2 with its first one), because its parser ends such a request with the head. And of
several requests that a client sends in one go, it tells only the last that the client has left, and reads no more while
any wait: the engine would compute on for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import Any, cast

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from aim_kserve.corked import CorkedHttp
from aim_kserve.errors import BadRequest
from aim_kserve.shortcut import EXTENSION, Leaving

LINGER_S = 2.0  # enough for what is on its way, and for a client to notice
MAX_HEAD_BYTES = 64 * 1024  # h11's own bound, and more than nginx's four buffers of 8 KiB
MAX_WAITING = 8  # requests of one connection, behind the one that is answered, while it is read on


class PatientHttp(CorkedHttp):
    """For ``uvicorn.Config(http=…)``: a head must be complete within ``patience_s`` seconds, and a body may not pause
    for longer. The client is told (408), where it has sent something, and its connection is closed."""

    patience_s: float = 30

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._unanswered: deque[RequestResponseCycle] = deque()  # in their order

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0  # of a head that is not complete
        self._in_head = False
        self._offer = b""  # a head that offers an upgrade, without the offer
        self._lingering = False
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.patience_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        for cycle in self._unanswered:
            if not cycle.response_complete:
                _leave(cycle)
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        was_in_head = self._in_head
        self._feed(data)
        if self._lingering:
            return
        if self.transport.is_closing():
            self._stop_waiting()
        elif self._in_head:
            self._wait_for_head(len(data), since_now=not was_in_head)
        elif self._timer is not None or self._awaits_body():
            self._stop_waiting()
            if self._awaits_body():
                self._timer = self.loop.call_later(self.patience_s, self._give_up)

    def _feed(self, data: bytes) -> None:
        """uvicorn's data_received, but that an upgrade is not taken: a server may ignore it (RFC 9110, 7.8)."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            head, self._offer = self._offer, b""
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._feed(head + data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(400, f"the request is not valid HTTP: {error}")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._offer = self._head_without_offer()
            return
        earlier = self.cycle
        super().on_headers_complete()
        if self.cycle is earlier:  # an upgrade
            return
        while self._unanswered and self._unanswered[0].response_complete:
            self._unanswered.popleft()
        self._unanswered.append(self.cycle)
        if 0 < len(self.pipeline) <= MAX_WAITING:
            self.flow.resume_reading()  # the end of the connection is read like a request
        self.scope["extensions"] = {EXTENSION: {"write": partial(_write, self.cycle), "leaving": Leaving()}}

    def on_message_complete(self) -> None:
        if not self._offer:
            super().on_message_complete()

    def _head_without_offer(self) -> bytes:
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = [item for item in self.headers if item[0] not in (b"connection", b"upgrade", b"http2-settings")]
        return line + b"".join(b"%s: %s\r\n" % item for item in kept) + b"\r\n"

    def _wait_for_head(self, more_bytes: int, *, since_now: bool) -> None:
        if since_now:
            self._stop_waiting()
            self._timer = self.loop.call_later(self.patience_s, self._give_up)
        self._head_bytes += more_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes: send less in headers")

    def _awaits_body(self) -> bool:
        cycle = self.cycle
        return cycle is not None and cycle.more_body and not cycle.response_complete

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _give_up(self) -> None:
        self._timer = None
        awaits_body = self._awaits_body()
        if self.flow.read_paused if awaits_body else self._is_answering():  # it is us for whom all wait
            self._timer = self.loop.call_later(self.patience_s, self._give_up)
        elif self._in_head or awaits_body:
            self._refuse(408, f"the request did not come within {self.patience_s:g} s: send it in one go")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self._is_answering() and self.cycle.response_started:
            self.transport.close()
            return
        if self._is_answering():  # to a request that does not come
            _leave(self.cycle)
            self.cycle.message_event.set()
        self.transport.write(_answer(status, message))
        self._linger()

    def _linger(self) -> None:
        """Close, but read on a while: closing with unread data resets the connection, and the answer may be lost."""
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self._lingering = True
            self.transport.write_eof()
            self._timer = self.loop.call_later(LINGER_S, self.transport.close)
        else:
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _leave(cycle: RequestResponseCycle) -> None:
    cycle.disconnected = True
    cast(Leaving, cycle.scope["extensions"][EXTENSION]["leaving"]).left()


def _write(cycle: RequestResponseCycle, body: bytes) -> bool:
    """What ``cycle.send`` does with a piece of a body, if it can be done at once; False where not, and nothing is."""
    if not cycle.response_started or cycle.response_complete or not cycle.chunked_encoding:
        return False
    if cycle.flow.write_paused or cycle.disconnected or cycle.transport.is_closing():
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True


def _answer(status: int, message: str) -> bytes:
    body = orjson.dumps(BadRequest(message).body())
    reason = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}[status]
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body


def patient(patience_s: float) -> type[Any]:
    """The protocol with its patience."""
    return type("Http", (PatientHttp,), {"patience_s": patience_s})
