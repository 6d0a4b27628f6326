"""Requests that must not be computed together take turns; imports no vLLM.

vLLM's CPU kernels compute a row without an adapter wrongly beside one with: for such rows the index of the adapter is
-1, and ``lora_b_weights[-1]`` is the last adapter's (vllm/lora/ops/torch_ops/lora_ops.py, 0.32.0). Rows of different
adapters do not disturb each other.
"""

from __future__ import annotations

import asyncio
from collections import deque

from aim_kserve.errors import Unavailable

#: Requests that may wait for their lane. One more is a 503.
MOST_WAITING = 256


class Lanes:
    """Of several lanes one is open at a time. First come, first served: who arrives while another lane is waited for
    does not pass it, so none starves."""

    def __init__(self, most_waiting: int = MOST_WAITING) -> None:
        self._most_waiting = most_waiting
        self._open = ""
        self._inside = 0
        self._queue: deque[tuple[str, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def enter(self, lane: str) -> None:
        """Return once requests of ``lane`` may run; then :meth:`leave` is owed.

        Raises:
            Unavailable: too many are waiting, or :meth:`end` was called.
        """
        if not self._queue and (not self._inside or self._open == lane):
            self._open, self._inside = lane, self._inside + 1
            return
        if len(self._queue) >= self._most_waiting:
            raise Unavailable(f"{len(self._queue)} requests are waiting already: retry later", code="queue_full")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((lane, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._queue = deque(item for item in self._queue if item[1] is not turn)
                self._admit()
            else:  # let in a moment ago
                self.leave()
            raise

    def leave(self) -> None:
        self._inside -= 1
        self._admit()

    def end(self) -> None:
        """Whoever waits is told that the engine is shutting down."""
        while self._queue:
            _, turn = self._queue.popleft()
            if not turn.done():
                turn.set_exception(Unavailable("the engine is shutting down"))

    def _admit(self) -> None:
        while self._queue:
            lane, turn = self._queue[0]
            if self._inside and lane != self._open:
                return
            self._queue.popleft()
            if not turn.done():
                self._open, self._inside = lane, self._inside + 1
                turn.set_result(None)
