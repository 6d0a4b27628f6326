"""Server-sent events read incrementally, however the bytes are cut.

https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

from typing import NamedTuple

_BOM = b"\xef\xbb\xbf"


class EventTooLarge(ValueError):
    """An event did not end within the limit."""


class Event(NamedTuple):
    """``data``: its data lines joined by newlines; None for a comment or an event without data. ``raw``: the event
    as it came, with ``\\n`` line ends and its blank line."""

    raw: bytes
    data: bytes | None
    name: bytes = b""


def sse(payload: bytes) -> bytes:
    """One server-sent event. A payload that already carries its ``event:`` line is framed as it is."""
    return (payload if payload.startswith(b"event:") else b"data: " + payload) + b"\n\n"


class EventReader:
    """``feed`` bytes as they come, get the events they complete; ``rest`` at the end."""

    def __init__(self, max_event_bytes: int = 8 * 2**20) -> None:
        self._buffer = b""
        self._after_return = False
        self._at_start = True
        self._max_event_bytes = max_event_bytes

    def feed(self, chunk: bytes) -> list[Event]:
        """Events complete now. Raises EventTooLarge."""
        chunk = self._normalised(chunk)
        if not chunk:
            return []
        whole, separator, self._buffer = (self._buffer + chunk).rpartition(b"\n\n")
        if len(self._buffer) > self._max_event_bytes:
            raise EventTooLarge(f"an event is larger than {self._max_event_bytes} bytes")
        if not separator:
            return []
        return [_event(block) for block in whole.split(b"\n\n") if block.strip(b"\n")]

    def rest(self) -> list[Event]:
        """What came without its closing blank line: browsers drop it, a guard must look at it."""
        block, self._buffer = self._buffer, b""
        return [_event(block)] if block.strip(b"\n") else []

    def _normalised(self, chunk: bytes) -> bytes:
        """Line ends as ``\\n``: a ``\\r`` ends its line at once, a ``\\n`` right after it is dropped."""
        if self._at_start and chunk:
            if len(self._buffer + chunk) < len(_BOM) and _BOM.startswith(self._buffer + chunk):
                self._buffer += chunk
                return b""
            chunk, self._buffer, self._at_start = (self._buffer + chunk).removeprefix(_BOM), b"", False
        if self._after_return and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_return = False
        if chunk:
            self._after_return = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in chunk else chunk


def _event(block: bytes) -> Event:
    block = block.strip(b"\n")
    raw = block + b"\n\n"
    if block.startswith(b"data: ") and b"\n" not in block:  # what nearly all are
        return Event(raw, block[6:])
    data, name = [], b""
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return Event(raw, b"\n".join(data) if data else None, name)
