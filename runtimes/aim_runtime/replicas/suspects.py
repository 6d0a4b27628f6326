"""Requests that end an engine's process whenever they come.

One that was alone in a process at its end is suspected. At the second time it is the cause as far as anybody can tell:
it is not put to another process, and refused for a while, in words that stop clients from retrying it by themselves.
Where others were in flight, nobody is suspected. One that is answered is suspected no longer.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

from aim_kserve.errors import ServingError
from aim_runtime.engines.base import EngineDied, Json

ENDS = 2
QUARANTINE_S = 600.0
KEPT = 256


class EndsTheEngine(ServingError):
    """It is not tried again. The header is the one that OpenAI's clients obey."""

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class Suspects:
    """Remembers digests of requests, no request itself. Costs nothing while nobody is suspected.

    Args:
        clock: seconds, monotonic; tests give their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # how many, and when the last one was

    def check(self, operation: str, body: Json) -> None:
        """Raises EndsTheEngine."""
        if not self._ends:
            return
        digest = _digest(operation, body)
        ends, at = self._ends.get(digest, (0, 0.0))
        if ends and self._clock() - at > QUARANTINE_S:
            del self._ends[digest]
        elif ends >= ENDS:
            raise _refusal(ends)

    def blame(self, operation: str, body: Json, death: EngineDied) -> ServingError:
        """What the client of a request is told whose process has died: ``death``, until it is known as the cause."""
        if not death.alone:
            return death
        digest = _digest(operation, body)
        ends = self._ends.pop(digest, (0, 0.0))[0] + 1
        self._ends[digest] = ends, self._clock()
        if len(self._ends) > KEPT:
            self._ends.popitem(last=False)
        return death if ends < ENDS else _refusal(ends)

    def acquit(self, operation: str, body: Json) -> None:
        """It has been answered."""
        if self._ends:
            self._ends.pop(_digest(operation, body), None)


def _digest(operation: str, body: Json) -> bytes:
    return blake2b(f"{operation}\0{body!r}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _refusal(ends: int) -> EndsTheEngine:
    return EndsTheEngine(
        f"this request was alone in the engine's process {ends} times when it ended: it is not tried again for "
        f"{QUARANTINE_S / 60:.0f} minutes; change the request, or look into the server's log",
        code="request_ends_engine",
    )
