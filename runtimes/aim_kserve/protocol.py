"""uvicorn's HTTP protocol for clients that do not finish what they begin.

uvicorn waits for a request for ever: a client that sends a byte of its head now and then (slow loris), or none at all,
holds a connection, and a head may grow without an end.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from aim_kserve.corked import CorkedHttp
from aim_kserve.errors import BadRequest

MAX_HEAD_BYTES = 64 * 1024  # h11's own bound, and more than nginx's four buffers of 8 KiB


class PatientHttp(CorkedHttp):
    """For ``uvicorn.Config(http=…)``: a head must be complete within ``patience_s`` seconds, and a body may not pause
    for longer. The client is told (408), where it has sent something, and its connection is closed."""

    patience_s: float = 30

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0  # of a head that is not complete
        self._in_head = False
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.patience_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        if self.transport.is_closing():
            self._stop_waiting()
        elif self._in_head:
            self._wait_for_head(len(data), since_now=not was_in_head)
        elif self._timer is not None or self._awaits_body():
            self._stop_waiting()
            if self._awaits_body():
                self._timer = self.loop.call_later(self.patience_s, self._give_up)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

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
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(_answer(status, message))
        self.transport.close()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _answer(status: int, message: str) -> bytes:
    body = orjson.dumps(BadRequest(message).body())
    reason = {408: "Request Timeout", 431: "Request Header Fields Too Large"}[status]
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body


def patient(patience_s: float) -> type[Any]:
    """The protocol with its patience."""
    return type("Http", (PatientHttp,), {"patience_s": patience_s})
