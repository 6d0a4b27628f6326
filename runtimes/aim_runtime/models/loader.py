"""Changing what is served: load, unload, migrate.

Changes of one name come one after the other; those of different names do not wait for each other, except that one at a
time is admitted, so that two cannot be promised the same memory. A change that has begun goes on when who asked for it
leaves, and is told to ``audit``; one that waits for its turn is dropped then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry

from aim_kserve.errors import BadRequest, Overloaded, ServingError, StartupError, Unavailable
from aim_kserve.server import settle_heap
from aim_runtime.model import RuntimeModel, State
from aim_runtime.models.entry import RANK, Launch, ModelEntry
from aim_runtime.models.eviction import DoesNotFit, Loaded, evictable, room
from aim_runtime.models.held import Held

logger = logging.getLogger("aim.server")

Eviction = Literal["never", "idle"]
#: Changes of one name that may wait for their turn: each may take minutes, and whoever asked for the last would wait
#: for all of them.
MOST_WAITING = 16


class Admit(Protocol):
    def __call__(self, entry: ModelEntry, *, without: Collection[str] = ()) -> None:
        """Asked before anything of ``entry`` is started. ``without``: as if those models had left.

        Raises:
            DoesNotFit: one line with the shortfall.
        """
        ...


class Trail(Protocol):
    """What every change is told to: :class:`aim_runtime.audit.Audit`."""

    def __call__(self, action: str, **fields: Any) -> None: ...


class Loader:
    """See the module.

    Args:
        held: name → what is held of it.
        cooldown_s: a model must have been loaded and unused so long before it makes way for another.
        drain_s: requests in flight of what is unloaded may take so long.
    """

    def __init__(
        self,
        held: Mapping[str, Held],
        *,
        admit: Admit,
        audit: Trail,
        eviction: Eviction,
        cooldown_s: float,
        drain_s: float,
        registry: CollectorRegistry,
        strict_fields: bool,
    ) -> None:
        self._held = held
        self._admit = admit
        self._audit = audit
        self._eviction = eviction
        self._cooldown_s = cooldown_s
        self._drain_s = drain_s
        self._registry = registry
        self._strict_fields = strict_fields
        self._admitting = asyncio.Lock()
        self._tasks: set[asyncio.Future[None]] = set()
        self._ending = False

    async def _in_turn(self, held: Held, change: Callable[[], Awaitable[None]]) -> None:
        """Carry a change out when it is its turn, to its end even if we are cancelled; before, it has not begun.

        Raises:
            Overloaded: too many wait already.
            Unavailable: the server is ending.
        """
        if held.waiting >= MOST_WAITING:
            raise Overloaded(f"model {held.name}: {held.waiting} changes of it wait for their turn: ask again later")
        held.waiting += 1
        try:
            await held.turn.acquire()
        finally:
            held.waiting -= 1
        if self._ending:
            held.turn.release()
            raise Unavailable("the server is shutting down")
        task = asyncio.ensure_future(change())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: held.turn.release())
        await asyncio.shield(task)

    async def stop(self) -> None:
        """End every change that is under way; none begins any more."""
        self._ending = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- load and unload ----------------------------------------------------------------------------------------

    async def load(self, held: Held) -> None:
        """Nothing to do where it serves.

        Raises:
            Unavailable: it is being started again by who watches it.
            DoesNotFit: nothing has changed.
            StartupError: it cannot be loaded, one line.
        """

        async def change() -> None:
            if held.model is not None and held.state is State.READY and held.model.alive():
                _check_serves(held.model)
                return
            with self._told("load", held):
                await self._load(held)

        await self._in_turn(held, change)

    async def _load(self, held: Held) -> None:
        if held.state in (State.FAILED, State.READY):  # it failed, or died
            await held.unload(self._drain_s, "loaded again")
        async with self._admitting:
            await self._make_room(held.entry)
            model = held.model or held.create(self._registry, strict_fields=self._strict_fields)
        logger.info("model %s: loading", held.name)
        try:
            await model.load_async()
        except Exception as error:
            await held.fail(str(error) or repr(error))
            raise
        held.watch()
        held.loaded_s = time.monotonic()
        held.reason, held.evicted = "", False
        settle_heap()
        logger.info("model %s: ready", held.name)

    async def load_at_start(self, held: Held) -> None:
        """Raises StartupError, one line, which is in the log then, and the model failed."""
        try:
            await self.load(held)
            return
        except DoesNotFit as error:
            failure = StartupError(f"model {held.name}: {error}")
        except StartupError as error:
            failure = error
        await held.fail(str(failure))
        logger.error("%s", failure)
        raise failure

    async def unload(self, held: Held) -> None:
        """Raises ServingError: a part of it does not end."""

        async def change() -> None:
            with self._told("unload", held):
                await self._unload(held, "unloaded")
                held.evicted = False

        await self._in_turn(held, change)

    async def _unload(self, held: Held, reason: str) -> None:
        await held.unload(self._drain_s, reason)
        settle_heap(left=True)

    # --- replicas -----------------------------------------------------------------------------------------------

    async def migrate(self, held: Held, to: Launch, leaving: str | None) -> None:
        """See :meth:`Models.migrate`."""

        async def change() -> None:
            old = held.replica_at(leaving)
            with self._told("migrate", held, source=old.place, target=to.place):
                await self._add(held, to)
                await held.remove(old, self._drain_s)

        await self._in_turn(held, change)

    async def add_replica(self, held: Held, to: Launch) -> None:
        """See :meth:`Models.add_replica`."""

        async def change() -> None:
            with self._told("add_replica", held, target=to.place):
                await self._add(held, to)

        await self._in_turn(held, change)

    async def remove_replica(self, held: Held, leaving: str) -> None:
        """See :meth:`Models.remove_replica`."""

        async def change() -> None:
            old = held.replica_at(leaving)
            if len(held.serving.replicas) == 1:
                raise BadRequest(f"model {held.name} has one replica: unload the model")
            with self._told("remove_replica", held, source=leaving):
                await held.remove(old, self._drain_s)

        await self._in_turn(held, change)

    async def _add(self, held: Held, to: Launch) -> None:
        if to.place in {replica.place for replica in held.serving.replicas}:
            raise BadRequest(f"model {held.name} has a replica at {to.place!r} already")
        async with self._admitting:
            try:
                self._admit(replace(held.entry, launches=(to,)))
            except DoesNotFit as error:
                raise does_not_fit(held.name, error) from error
        await held.add(to)

    # --- room ---------------------------------------------------------------------------------------------------

    async def _make_room(self, entry: ModelEntry) -> None:
        """Raises DoesNotFit: nothing has been unloaded then."""
        for name in room(lambda without: self._admit(entry, without=without), self._candidates(entry)):
            await self._evict(self._held[name], entry.name)

    def _candidates(self, entry: ModelEntry) -> list[str]:
        if self._eviction == "never":
            return []
        loaded = [
            Loaded(
                held.name,
                RANK[held.entry.priority],
                held.model.in_flight.count,
                held.model.last_used_s,
                held.loaded_s,
            )
            for held in self._held.values()
            if held.model is not None and held.state is State.READY and not held.turn.locked()
        ]
        return evictable(loaded, RANK[entry.priority], time.monotonic(), self._cooldown_s)

    async def _evict(self, held: Held, for_model: str) -> None:
        if held.turn.locked():  # waiting for it could be waiting for each other
            raise DoesNotFit(f"{held.name}, which would make room, is being changed: ask again")
        async with held.turn:
            with self._told("evict", held, made_room_for=for_model):
                await self._unload(held, f"unloaded to make room for {for_model}")
                held.evicted = True

    @contextmanager
    def _told(self, action: str, held: Held, **fields: str) -> Iterator[None]:
        """Tell the audit how it ended."""
        started_s = time.monotonic()
        outcome, reason = "ok", None
        try:
            yield
        except BaseException as error:
            refused = isinstance(error, DoesNotFit) or (isinstance(error, ServingError) and error.status < 500)
            outcome, reason = "refused" if refused else "failed", str(error) or repr(error)
            raise
        finally:
            seconds = round(time.monotonic() - started_s, 3)
            self._audit(action, model=held.name, outcome=outcome, reason=reason, seconds=seconds, **fields)


def _check_serves(model: RuntimeModel) -> None:
    """Raises Unavailable where a loaded model's engine does not answer now."""
    if not model.runs_on.healthy() and (refusal := model.refusal()) is not None:
        raise refusal


def does_not_fit(name: str, error: DoesNotFit) -> ServingError:
    """What who asked for it is told."""
    return ServingError(f"model {name}: {error}", status=409, code="does_not_fit")
