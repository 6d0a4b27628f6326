"""The trail: entries wait in a bounded queue for a thread that writes them, so that no request waits for a disk."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from typing import Any, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter

from aim_guardrail.audit.file import AuditFile
from aim_kserve.errors import Unavailable

logger = logging.getLogger("aim.audit")

Overflow = Literal["drop", "block", "refuse"]

#: Of one write.
_BATCH = 256
_RETRY_S = 1.0
#: How long the end of the process waits for what has not been written.
_ENDING_S = 2.0


class Trail:
    """An audit that is being written.

    Args:
        most: entries that may wait.
        overflow: what becomes of more. `drop`: they are lost, and counted, in the audit too; `block`: whoever brings
            one waits; `refuse`: requests are refused before there is anything to say of them.
    """

    def __init__(
        self, file: AuditFile, overflow: Overflow, most: int = 10_000, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._file, self._overflow, self._most = file, overflow, most
        self._waiting: deque[dict[str, Any]] = deque()
        self._reserved = 0
        self._lost = 0
        self._stopped = False
        self._change = threading.Condition()
        self._room: asyncio.Event | None = None
        self._dropped = Counter("guardrail_audit_dropped", "Audit entries that were not written", registry=registry)
        self._failures = Counter("guardrail_audit_failures", "Writes of the audit that failed", registry=registry)
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def reserve(self, entries: int) -> None:
        """Room for so many, under `refuse`; to be given back by :meth:`release`.

        Raises:
            Unavailable: there is none.
        """
        if self._overflow != "refuse":
            return
        with self._change:
            if len(self._waiting) + self._reserved + entries > self._most:
                raise Unavailable(
                    "nothing passes unaudited, and the audit's file cannot be written fast enough: ask again",
                    code="audit_backlog",
                    retry_after_s=1,
                )
            self._reserved += entries

    def release(self, entries: int) -> None:
        """What was reserved is not needed any more."""
        if self._overflow == "refuse":
            with self._change:
                self._reserved -= entries

    async def put(self, fields: dict[str, Any]) -> None:
        """Have an entry written. Waits only under `block`."""
        while not self._taken(fields):
            if self._room is None:
                self._loop, self._room = asyncio.get_running_loop(), asyncio.Event()
            self._room.clear()
            if not self._is_full():  # it emptied between the two
                continue
            await self._room.wait()

    def close(self) -> None:
        """Write what waits, within bounds, and end. Blocking."""
        with self._change:
            self._stopped = True
            self._change.notify()
        self._thread.join(_ENDING_S)
        if not self._thread.is_alive():
            self._file.close()
        if self._waiting:
            logger.error("%d audit entries are lost: they could not be written", len(self._waiting))

    def _taken(self, fields: dict[str, Any]) -> bool:
        with self._change:
            if len(self._waiting) < self._most or self._overflow == "refuse":  # then it is reserved
                self._waiting.append(fields)
                self._change.notify()
                return True
            if self._overflow == "drop":
                self._lost += 1
                self._dropped.inc()
                return True
        return False

    def _is_full(self) -> bool:
        with self._change:
            return len(self._waiting) >= self._most

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._stopped:
                    self._change.wait()
                if not self._waiting:
                    return
                batch = [self._waiting[at] for at in range(min(_BATCH, len(self._waiting)))]
                lost = self._lost
            if self._written([{"ts": time.time(), "lost": lost}, *batch] if lost else batch):
                self._forget(len(batch), lost)
            elif self._stopped:
                return
            else:
                time.sleep(_RETRY_S)

    def _forget(self, written: int, lost: int) -> None:
        with self._change:
            for _ in range(written):
                self._waiting.popleft()
            self._lost -= lost
        if self._room is not None:
            self._loop.call_soon_threadsafe(self._room.set)

    def _written(self, batch: list[dict[str, Any]]) -> bool:
        try:
            self._file.append(batch)
        except (OSError, ValueError) as error:  # full, gone read-only, locked by another
            self._failures.inc()
            logger.error("the audit cannot be written (%s): tried again in %g s", error, _RETRY_S)
            return False
        return True
