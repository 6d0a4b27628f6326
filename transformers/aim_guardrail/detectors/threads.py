"""Threads for what batch detectors compute, bounded: a call that is given up goes on in its thread until it ends.

Cancelling a coroutine never stops a thread. So there are a fixed number of them, what waits for one is bounded, too,
and calls whose answer nobody waits for any more are counted (``guardrail_abandoned_calls``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Busy(Exception):
    """Every thread is taken, by calls that were given up, too, and as many wait as may: an answer would come late."""


class Abandoned:
    """How many calls run on whose answer nobody waits for. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.count = 0

    def add(self, by: int) -> None:
        with self._lock:
            self.count += by


ABANDONED = Abandoned()
"""Of this process: calls in threads, and of detectors that do not end when they are cancelled."""


class Threads:
    """A pool of threads whose calls can be given up.

    Args:
        count: how many run at once.
        name: of the threads, for whoever looks at the process.
        most_waiting: how many more calls wait for a thread.
    """

    def __init__(self, count: int, name: str, most_waiting: int = 64) -> None:
        self._pool = ThreadPoolExecutor(count, name)
        self._most = count + most_waiting
        self._held = 0

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``call(*args, **kwargs)`` in one of the threads. When this is cancelled, a call that waits never begins.

        Raises:
            Busy: too many wait.
        """
        if self._held >= self._most:
            raise Busy(f"{self._held} calls run or wait for a thread")
        self._held += 1
        loop = asyncio.get_running_loop()
        future = self._pool.submit(call, *args, **kwargs)
        future.add_done_callback(lambda _: _soon(loop, self._ended))
        answer = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(_look_at)
            _abandon(future)
            raise

    def close(self) -> None:
        """End the threads, each when its call has ended; what waits never begins."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ended(self) -> None:
        self._held -= 1


def _look_at(answer: asyncio.Future[Any]) -> None:
    """Whatever a call that was given up raised, nobody waits for it; asyncio would tell of it."""
    if not answer.cancelled():
        answer.exception()


def _abandon(future: Future[Any]) -> None:
    if not future.cancel() and not future.done():
        ABANDONED.add(1)
        future.add_done_callback(lambda _: ABANDONED.add(-1))


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call it on the loop; one that has ended by now needs no more counting."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)
