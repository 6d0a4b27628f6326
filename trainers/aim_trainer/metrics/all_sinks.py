"""Several sinks told as one."""

from __future__ import annotations

from collections.abc import Iterable

from .records import Record, Sink


class AllSinks:
    """Tells each in turn."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)

    def tell(self, record: Record) -> None:
        for sink in self._sinks:
            sink.tell(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
