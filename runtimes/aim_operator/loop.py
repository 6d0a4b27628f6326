"""What is kept as it should be, for as long as it is there: looked at when it wants to be, and when a bell rings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from .cluster import TROUBLE, Contended

_LOG = logging.getLogger("aim.operator.loop")
_FIRST_S, _LONGEST_S = 1.0, 60.0


class Bells:
    """One for each object that is kept, by its name."""

    def __init__(self) -> None:
        self._bells: dict[str, asyncio.Event] = {}

    def of(self, name: str) -> asyncio.Event:
        """The bell to wait for."""
        return self._bells.setdefault(name, asyncio.Event())

    def ring(self, name: str) -> None:
        """Somebody may want to look; nobody does where nothing of that name is kept."""
        if (bell := self._bells.get(name)) is not None:
            bell.set()


async def keep(what: str, once: Callable[[], Awaitable[float | None]], bell: asyncio.Event) -> None:
    """Until `once` says None; it says how long, in seconds, until it wants to look again.

    A cluster that refuses or is away is asked again, after a pause that doubles.
    """
    pause_s = _FIRST_S
    while True:
        bell.clear()
        try:
            waits_s = await once()
            pause_s = _FIRST_S
        except (*TROUBLE, Contended) as error:
            _LOG.warning("%s: %s; tried again in %.0f s", what, error, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_S)
            continue
        if waits_s is None:
            return
        await _wait(bell, waits_s)


async def _wait(bell: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await bell.wait()
    except TimeoutError:
        return
