"""From the decode thread to whoever waits: a step's deltas in one call into each event loop.

``add`` and ``flush`` belong to the decode thread, the rest to the event loops. A request that was given up hears
nothing more, whatever the thread still adds.
"""

from __future__ import annotations

import asyncio
import contextlib

from aim_kserve.errors import Unavailable

from .sequence import Delta, Sequence

STALLED_RETRY_S = 5


class Deliveries:
    """Knows which sequences have not had their last delta."""

    def __init__(self) -> None:
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[Sequence, Delta]]] = {}
        self._unanswered: set[Sequence] = set()

    @property
    def outstanding(self) -> bool:
        """Whether a request still waits for (the rest of) its answer."""
        return bool(self._unanswered)

    def expect(self, sequence: Sequence) -> None:
        """Deltas of ``sequence`` will come."""
        self._unanswered.add(sequence)

    def add(self, sequence: Sequence, delta: Delta) -> None:
        self._outbox.setdefault(sequence.loop, []).append((sequence, delta))

    def flush(self) -> None:
        """Hand over what was added."""
        for loop, items in self._outbox.items():
            try:
                loop.call_soon_threadsafe(self._deliver, items)
            except RuntimeError:  # that loop is closed: nobody is left to read
                for sequence, _ in items:
                    sequence.cancelled = True
                    self._unanswered.discard(sequence)
        self._outbox = {}

    def give_up(self, reason: str) -> None:
        """Tell every request that no answer comes, while the thread stands still. It goes on without them."""
        for sequence in list(self._unanswered):
            sequence.cancelled = True
            self._unanswered.discard(sequence)
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody is left to read
                sequence.loop.call_soon_threadsafe(
                    sequence.sink, sequence.delta(error=Unavailable(reason, retry_after_s=STALLED_RETRY_S))
                )

    def _deliver(self, items: list[tuple[Sequence, Delta]]) -> None:
        for sequence, delta in items:
            if sequence in self._unanswered:
                sequence.sink(delta)
            if delta.last:
                self._unanswered.discard(sequence)
