"""One name on several devices: an engine over engines.

Each request goes to one replica (:mod:`aim_runtime.replicas.choice`). One that dies or is full before it has given
anything is replaced by another one, once: a client never gets two answers, nor half of one and half of another.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

from aim_kserve.errors import BadRequest, ServingError, ShutdownError, Unavailable
from aim_runtime.admission.engine import bare, followed
from aim_runtime.admission.queue import Full
from aim_runtime.engines.base import (
    Engine,
    EngineDied,
    EngineStats,
    Json,
    ModelLoadError,
    Operation,
    Prove,
    RequestContext,
    StartsAgain,
    Stream,
    TakesAdapters,
)
from aim_runtime.fields import Fields
from aim_runtime.in_flight import InFlight
from aim_runtime.memory_watch import Gate
from aim_runtime.replicas.choice import Choice, prefix_of
from aim_runtime.replicas.suspects import Suspects

logger = logging.getLogger("aim.server")


class Replica:
    """One engine, where it runs (``place``, for people), its memory's ``gate``, and how many requests it has.
    ``prove``: what it must show once loaded."""

    def __init__(self, engine: Engine, place: str = "", gate: Gate | None = None, prove: Prove | None = None) -> None:
        self.engine = engine
        self.place = place
        self.gate = gate
        self._prove = prove
        self.in_flight = InFlight()

    async def load(self) -> None:
        """Raises ModelLoadError: it cannot be loaded, or does not show what it must."""
        await self.engine.load()
        if self._prove is not None:
            engine = bare(self.engine)
            if isinstance(engine, StartsAgain):
                engine.prove = self._prove
            await self._prove(engine)

    def full(self) -> Unavailable | None:
        """Why its memory admits no request now; None if it does."""
        return None if self.gate is None else self.gate.refusal()

    def answers(self) -> bool:
        return self.engine.healthy() and self.full() is None

    async def close(self) -> None:
        if self.gate is not None:
            self.gate.close()
        await self.engine.close()

    def busy(self) -> float:
        """Requests per slot, and the share of the KV cache in use. Our own count is ahead of an engine's in another
        process."""
        stats = self.engine.stats()
        requests = max(self.in_flight.count, stats.running + stats.waiting)
        return requests / max(1, stats.slots_total) + (stats.kv_cache_usage or 0.0)

    async def drain(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        await self.in_flight.end(timeout_s)
        await self.engine.drain(max(0.0, deadline_s - time.monotonic()))


class Gates:
    """Admission to a name: where one replica that lives admits a request."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def refusal(self) -> Unavailable | None:
        refusals = [replica.full() for replica in self._replicas.replicas if replica.engine.healthy()]
        return refusals[0] if refusals and all(refusals) else None

    def close(self) -> None:
        """Each replica closes its own."""


class _Common(Mapping[str, Operation]):
    """Looked up per request: nothing is built but what is asked for."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def __getitem__(self, name: str) -> Operation:
        if not all(name in replica.engine.operations for replica in self._replicas.replicas):
            raise KeyError(name)
        return partial(self._replicas.run, name)

    def __iter__(self) -> Iterator[str]:
        first, *others = (replica.engine.operations for replica in self._replicas.replicas)
        return (name for name in first if all(name in other for other in others))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Replicas:
    """See the module; implements :class:`aim_runtime.engines.base.Engine`.

    Args:
        replicas: at least one, none of them loaded.
        choice: where chance comes from; tests give a seeded one.
    """

    def __init__(self, replicas: Sequence[Replica], choice: random.Random | None = None) -> None:
        self._replicas = list(replicas)
        self.name = replicas[0].engine.name
        self._choice: Choice[Replica] = Choice(choice or random.Random())
        self._suspects = Suspects()
        self._adapters: dict[str, Path] = {}  # loaded at run time
        self._unloaded: set[str] = set()
        self._changing = asyncio.Lock()

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """Those that get requests."""
        return tuple(self._replicas)

    # --- what an engine is --------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        return self._first.version

    @property
    def _first(self) -> Engine:
        return self._replicas[0].engine

    @property
    def operations(self) -> Mapping[str, Operation]:
        """Those that every replica has."""
        return _Common(self)

    @property
    def requests(self) -> Mapping[str, Fields | None]:
        return self._first.requests

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those that every replica has."""
        first, *others = (replica.engine.adapters for replica in self._replicas)
        return tuple(name for name in first if all(name in other for other in others))

    @property
    def max_model_len(self) -> int:
        return min(replica.engine.max_model_len for replica in self._replicas)

    def healthy(self) -> bool:
        """Whether any replica can answer."""
        return any(replica.engine.healthy() for replica in self._replicas)

    def stats(self) -> EngineStats:
        """Of all together; ``stalled_s`` is the shortest, as one that moves is enough to answer."""
        all_stats = [replica.engine.stats() for replica in self._replicas]
        if len(all_stats) == 1:
            return all_stats[0]
        kv = [stats.kv_cache_usage for stats in all_stats if stats.kv_cache_usage is not None]
        stalled = [stats.stalled_s for stats in all_stats if stats.stalled_s is not None]
        cells = [stats.kv_tokens_total for stats in all_stats if stats.kv_tokens_total is not None]
        states = {stats.state for stats in all_stats}
        restarts = [stats.restarts for stats in all_stats if stats.restarts is not None]
        return EngineStats(
            sum(stats.running for stats in all_stats),
            sum(stats.waiting for stats in all_stats),
            sum(stats.slots_total for stats in all_stats),
            sum(kv) / len(kv) if kv else None,
            min(stalled, default=None),
            kv_tokens_total=sum(cells) if len(cells) == len(all_stats) else None,
            parked=sum(stats.parked for stats in all_stats),
            state=next(
                (state for state in ("ready", "restarting", "unreachable", "loading", "failed") if state in states),
                None,
            ),
            restarts=sum(restarts) if restarts else None,
            last_words=next((stats.last_words for stats in all_stats if stats.last_words), None),
        )

    # --- life ---------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load all, side by side. Some that cannot be loaded are left out, and said in the log.

        Raises:
            ModelLoadError: none can be loaded.
        """
        replicas = list(self._replicas)
        results = await asyncio.gather(*(replica.load() for replica in replicas), return_exceptions=True)
        failures = [(replica, result) for replica, result in zip(replicas, results, strict=True) if result is not None]
        unforeseen = next((error for _, error in failures if not isinstance(error, ModelLoadError)), None)
        if unforeseen is not None or len(failures) == len(replicas):
            raise unforeseen or failures[0][1]
        for replica, error in failures:
            logger.error("replica %s cannot be loaded: %s", replica.place, error)
            self._replicas.remove(replica)
            await replica.close()

    async def add(self, replica: Replica) -> None:
        """Load one more; it gets requests from then on.

        Raises:
            ModelLoadError: it cannot be loaded; nothing has changed.
        """
        async with self._changing:
            try:
                await replica.load()
                for name in self._unloaded.intersection(replica.engine.adapters):  # its start had it
                    await _taking(replica.engine).unload_adapter(name)
                for name, path in self._adapters.items():
                    await _taking(replica.engine).load_adapter(name, path)
            except BaseException:
                await replica.close()
                raise
            self._replicas.append(replica)

    async def remove(self, replica: Replica, drain_s: float) -> None:
        """No more requests for one; free it once those it has are done, at most ``drain_s`` seconds.

        Raises:
            ValueError: it is the last one.
            ShutdownError: a part of it does not end.
        """
        if self._replicas == [replica]:
            raise ValueError("the last replica stays: unload the model")
        self._replicas.remove(replica)
        self._choice.forget(replica)
        try:
            await replica.drain(drain_s)
        finally:  # nobody else knows it any more
            await replica.close()

    async def drain(self, timeout_s: float) -> None:
        await asyncio.gather(*(replica.drain(timeout_s) for replica in self._replicas))

    async def close(self) -> None:
        results = await asyncio.gather(*(replica.close() for replica in self._replicas), return_exceptions=True)
        unforeseen = [result for result in results if result is not None and not isinstance(result, ShutdownError)]
        stuck = [str(result) for result in results if isinstance(result, ShutdownError)]
        if unforeseen:
            raise unforeseen[0]
        if stuck:
            raise ShutdownError("; ".join(stuck))

    async def load_adapter(self, name: str, path: Path) -> None:
        """On every replica, or on none. See :class:`TakesAdapters`.

        Raises:
            Unavailable: a replica is down; nothing has changed.
        """
        async with self._changing:
            engines = self._takers()
            was_there, old = name in self.adapters, self._adapters.get(name)
            done: list[TakesAdapters] = []
            try:
                for engine in engines:
                    await engine.load_adapter(name, path)
                    done.append(engine)
            except ServingError:
                try:
                    for engine in done:
                        if old is not None:
                            await engine.load_adapter(name, old)
                        elif not was_there:
                            await engine.unload_adapter(name)
                except ServingError as error:
                    logger.error("adapter %s is not on every replica as it was: %s", name, error)
                raise
            self._adapters[name] = path
            self._unloaded.discard(name)

    async def unload_adapter(self, name: str) -> None:
        """On every replica. Raises as :meth:`load_adapter`."""
        async with self._changing:
            engines = self._takers()
            known = any(name in replica.engine.adapters for replica in self._replicas)
            for replica, engine in list(zip(self._replicas, engines, strict=True)):
                if name in replica.engine.adapters or not known:  # then the first one says so
                    await engine.unload_adapter(name)
            self._adapters.pop(name, None)
            self._unloaded.add(name)

    def _takers(self) -> list[TakesAdapters]:
        """All of them. Raises BadRequest: one takes no adapters; Unavailable: one is down."""
        engines = [_taking(replica.engine) for replica in self._replicas]
        if not all(replica.engine.healthy() for replica in self._replicas):
            raise Unavailable(
                "a replica of the model is down: adapters are not changed before all answer; ask again",
                code="replica_down",
                retry_after_s=5,
            )
        return engines

    # --- requests -----------------------------------------------------------------------------------------------

    async def run(self, operation: str, body: Json, context: RequestContext) -> Json | Stream:
        """One operation on one replica, or on a second one where the first dies or is full.

        Raises:
            EndsTheEngine: it has ended an engine's process each time it came.
        """
        self._suspects.check(operation, body)
        if len(self._replicas) == 1:
            return await self._on(self._replicas[0], operation, body, context)
        prefix = prefix_of(body)
        healthy = [replica for replica in self._replicas if replica.answers()]
        replica = self._choice.of(healthy or self._replicas, prefix)
        try:
            answer = await self._on(replica, operation, body, context)
        except (Unavailable, Full) as error:
            return await self._elsewhere(replica, error, operation, body, context, prefix)
        if isinstance(answer, dict):
            return answer
        return self._stream(replica, answer, operation, body, context, prefix)

    async def _on(self, replica: Replica, operation: str, body: Json, context: RequestContext) -> Json | Stream:
        """On that one."""
        try:
            with replica.in_flight:
                answer = await replica.engine.operations[operation](body, context)
        except EngineDied as death:
            raise self._suspects.blame(operation, body, death) from None
        if isinstance(answer, dict):
            self._suspects.acquit(operation, body)
            return answer
        return self._held(replica, answer, operation, body)

    async def _held(self, replica: Replica, chunks: Stream, operation: str, body: Json) -> Stream:
        try:
            with replica.in_flight:
                async with aclosing(chunks):
                    with followed(chunks) as stream:
                        async for chunk in stream:
                            yield chunk
        except EngineDied as death:
            raise self._suspects.blame(operation, body, death) from None
        self._suspects.acquit(operation, body)

    async def _elsewhere(
        self,
        failed: Replica,
        error: ServingError,
        operation: str,
        body: Json,
        context: RequestContext,
        prefix: bytes,
    ) -> Json | Stream:
        """The same of another replica; ``error`` where there is none. What the other one says is the answer."""
        others = [replica for replica in self._replicas if replica is not failed and replica.answers()]
        if not others:
            raise error
        context.usage.clear()
        replica = self._choice.of(others, prefix)
        level = logging.DEBUG if isinstance(error, Full) else logging.INFO  # under overload that is most of them
        logger.log(level, "request %s goes to another replica: %s", context.request_id, error)
        return await self._on(replica, operation, body, context)

    async def _stream(
        self,
        replica: Replica,
        chunks: Stream,
        operation: str,
        body: Json,
        context: RequestContext,
        prefix: bytes,
    ) -> Stream:
        begun = False
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    begun = True
                    yield chunk
            return
        except Unavailable as error:
            if begun:
                raise
            failure = error
        answer = await self._elsewhere(replica, failure, operation, body, context, prefix)
        assert not isinstance(answer, dict)  # the body has not changed
        async with aclosing(answer) as other:
            async for chunk in other:
                yield chunk


def _taking(engine: Engine) -> TakesAdapters:
    if not isinstance(engine, TakesAdapters):
        raise BadRequest(f"the {engine.name} engine takes no adapters while it serves: give them at the start")
    return engine
