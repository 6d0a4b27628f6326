"""The policies in force: one reference, which a reload replaces."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from aim_guardrail.detectors.base import BatchDetector
from aim_guardrail.in_force.generation import Generation, try_models
from aim_guardrail.metrics import Metrics
from aim_kserve.errors import Unavailable

logger = logging.getLogger("aim.policy")


class Policies:
    """Which guard a request gets. All of it runs on the event loop.

    A request has one guard from its head to its last byte: what is put in force meanwhile is for those that come
    later. What only an old generation needs is closed when the last of its requests has left.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._current: Generation | None = None
        self._leaving: dict[Generation, asyncio.Task[None]] = {}

    @property
    def current(self) -> Generation | None:
        """The generation in force; None while the first is loading."""
        return self._current

    async def put_in_force(self, generation: Generation) -> None:
        """From now on requests are judged by it.

        Raises:
            DetectorFailed: a model of it does not work: what was in force stays.
        """
        old = self._current
        try:
            await try_models(_without(generation.detectors, old))
        except BaseException:
            await self._close(generation.detectors)
            raise
        self._current = generation
        self._metrics.policies(generation.policies)
        if old is not None:
            self._leaving[old] = asyncio.ensure_future(self._retire(old))

    def generation(self) -> Generation:
        """The generation that serves a request; ``with`` it, so that it is kept until that has been answered.

        Raises:
            Unavailable: none is loaded yet.
        """
        if self._current is None:
            raise Unavailable("the guardrail is still loading: ask again")
        return self._current

    async def close(self) -> None:
        """Close every detector; no request is left."""
        for task in self._leaving.values():
            task.cancel()
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)
        held = [*self._leaving, self._current]
        self._current, self._leaving = None, {}
        await self._close({at: d for each in held if each is not None for at, d in each.detectors.items()})

    async def _retire(self, old: Generation) -> None:
        await old.idle.wait()
        del self._leaving[old]
        await self._close(old.detectors)

    async def _close(self, detectors: Mapping[int, BatchDetector]) -> None:
        """Close those that no generation needs."""
        for detector in _without(detectors, self._current, *self._leaving):
            try:
                await detector.close()
            except Exception:  # the edge of third-party engines: the others are closed all the same
                logger.exception("detector %s could not be closed", detector.family)


def _without(detectors: Mapping[int, BatchDetector], *others: Generation | None) -> list[BatchDetector]:
    """Those that none of the others has."""
    known = {at for other in others if other is not None for at in other.detectors}
    return [detector for at, detector in detectors.items() if at not in known]
