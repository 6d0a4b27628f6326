"""uvicorn's HTTP protocol with one write, not two, for an answer's head and the body behind it.

uvicorn writes the head when a response starts and the body when it comes: two system calls, two TCP segments, and a
client that is woken twice. Here the head waits for the body, at most until the event loop's next step. To the plain
form it is, at 1, 8 and 64 requests at a time, 0.88, 0.94 and 0.98 in CPU and 0.82, 0.86 and 0.98 in median latency for
whole answers, 0.96, 0.94 and 1.00 in CPU and 0.93, 0.92 and 0.90 in latency for streams of 64 tokens (medians of 9
paired rounds on a busy machine, ``bench/server.py --quick --without cork``).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class CorkedHttp(HttpToolsProtocol):
    """For ``uvicorn.Config(http=…)``."""

    def on_headers_complete(self) -> None:
        earlier = self.cycle
        super().on_headers_complete()
        if self.cycle is not earlier:  # not an upgrade; its task has not begun
            _Cork(self.cycle, self.loop)


class _Cork:
    """One response's transport until its head is written; then it is the real one again."""

    __slots__ = ("_cycle", "_head", "_loop", "_transport")

    def __init__(self, cycle: RequestResponseCycle, loop: asyncio.AbstractEventLoop) -> None:
        self._cycle, self._loop = cycle, loop
        self._transport = cycle.transport
        self._head = b""
        cycle.transport = self  # type: ignore[assignment]

    def write(self, data: bytes) -> None:
        if self._head:
            self._head += data
            self._pull()
        else:
            self._head = data
            self._loop.call_soon(self._pull)

    def _pull(self) -> None:
        if self._head:
            if not self._transport.is_closing():  # the client may have left since
                self._transport.write(self._head)
            self._head = b""
            self._cycle.transport = self._transport

    def close(self) -> None:
        self._pull()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
