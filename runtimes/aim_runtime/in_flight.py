"""How many requests are in flight, and a way to wait until none is."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class InFlight:
    """``with in_flight:`` around each request."""

    __slots__ = ("_none", "count")

    def __init__(self) -> None:
        self.count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> Self:
        self.count += 1
        self._none.clear()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.count -= 1
        if not self.count:
            self._none.set()

    async def end(self, timeout_s: float) -> bool:
        """Wait until none is, at most ``timeout_s``; whether that came."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.count:  # one may have come since the event woke us
                    await self._none.wait()
        except TimeoutError:
            return False
        return True
