"""Work that would hold the event loop up runs in threads, and whoever closes the model can wait for their end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from typing import TypeVar

from aim_kserve.errors import Unavailable

T = TypeVar("T")

#: llama.cpp tokenizes about 3 MB/s, so this is 2 ms.
INLINE_CHARACTERS = 6000
#: Enough for llama.cpp's tokenizer, which computes without the interpreter's lock, beside Python that needs it.
THREADS = 2


class Background:
    """A few threads. A caller that is cancelled leaves its work running: it ends by itself, in bounded time."""

    def __init__(self, name: str) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix=name)
        self._running: set[concurrent.futures.Future[object]] = set()
        self._began: dict[object, float] = {}
        self._over = False

    @property
    def busy(self) -> bool:
        """Whether work is running or waiting for a thread, its caller being there or not."""
        return bool(self._running)

    @property
    def stalled_s(self) -> float:
        """Seconds that the oldest work has been running."""
        return time.monotonic() - min(list(self._began.values()), default=time.monotonic())

    async def run(self, work: Callable[[], T], cost: int) -> T:
        """``work()``, in a thread unless it costs less than the way there.

        Args:
            work: ends in bounded time.
            cost: characters it tokenizes, or as long as that takes.

        Raises:
            Unavailable: ``end`` was called before it was done.
        """
        if cost <= INLINE_CHARACTERS:
            return work()
        try:
            future = self._threads.submit(self._timed, work)
            self._running.add(future)  # type: ignore[arg-type]  # invariant, and we only wait for it
            future.add_done_callback(self._running.discard)
            return await asyncio.wrap_future(future)
        except BaseException as error:
            task = asyncio.current_task()
            if self._over and not (
                task and task.cancelling()
            ):  # refused, dropped or interrupted: all one to the caller
                raise Unavailable("the engine is shutting down") from error
            raise

    def _timed(self, work: Callable[[], T]) -> T:
        key = object()
        self._began[key] = time.monotonic()
        try:
            return work()
        finally:
            del self._began[key]

    def end(self, timeout_s: float) -> bool:
        """Take no more work, drop what has not begun, wait for the rest. False when it is still running. Blocks."""
        self._over = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        return not concurrent.futures.wait(list(self._running), timeout_s).not_done
