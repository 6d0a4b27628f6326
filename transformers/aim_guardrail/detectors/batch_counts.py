"""What the classifiers of this process did: rows a batch, and how many callers wait. For whoever shows metrics."""

from __future__ import annotations

from threading import Lock
from typing import Protocol
from weakref import WeakSet

ROWS = (1, 2, 4, 8, 16)
"""Upper bounds of the histogram's buckets; no batch is larger than the last."""


class _Queue(Protocol):
    @property
    def waiting(self) -> int: ...


class BatchCounts:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._sizes = dict.fromkeys(ROWS, 0)
        self._rows = 0
        self._queues: WeakSet[_Queue] = WeakSet()

    def watch(self, queue: _Queue) -> None:
        """Count who waits in it, as long as it lives."""
        with self._lock:
            self._queues.add(queue)

    def add(self, rows: int) -> None:
        """A batch has run."""
        with self._lock:
            self._rows += rows
            self._sizes[next((bound for bound in ROWS if rows <= bound), ROWS[-1])] += 1

    def waiting(self) -> int:
        """How many callers wait for any model."""
        with self._lock:
            return sum(queue.waiting for queue in self._queues)

    def sizes(self) -> tuple[list[tuple[str, float]], float]:
        """Batches up to each bound, cumulated as a histogram has them; and all rows together."""
        with self._lock:
            total, found = 0, list[tuple[str, float]]()
            for bound in ROWS:
                total += self._sizes[bound]
                found.append((f"{bound:.1f}", total))
            return [*found, ("+Inf", total)], self._rows


BATCH_COUNTS = BatchCounts()
"""Of this process."""
