"""Several sinks told as one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable

from .records import Record, Sink

_LOG = logging.getLogger(__name__)


class AllSinks:
    """Tells each in turn. A sink whose place is full or away costs a line in the log, once, and never the training."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)
        self._failed: set[int] = set()

    def tell(self, record: Record) -> None:
        for sink in self._sinks:
            self._try(sink, functools.partial(sink.tell, record))

    def close(self) -> None:
        for sink in self._sinks:
            self._try(sink, sink.close)

    def _try(self, sink: Sink, do: Callable[[], None]) -> None:
        try:
            do()
        except OSError as problem:
            if id(sink) not in self._failed:
                self._failed.add(id(sink))
                _LOG.warning("%s: %s; training goes on, and this is not said again", type(sink).__name__, problem)
