"""The directory of models: the only thing that routes, protocols, probes and the repository API ask.

A name is known from the start and served between a load and an unload. Loads and unloads of one name come one after
the other; those of different names do not wait for each other, except that one load at a time is admitted, so that two
cannot be promised the same memory. Every change is an admin action and is told to ``audit``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from aim_kserve.errors import BadRequest, NotFound, ServingError, ShutdownError, StartupError, Unavailable
from aim_kserve.kserve import Model
from aim_kserve.server import settle_heap
from aim_runtime.engine_gauges import Device
from aim_runtime.engines.base import Engine, Json
from aim_runtime.memory_watch import Gate
from aim_runtime.metrics import Metrics
from aim_runtime.model import NamedModel, RuntimeModel, State, check_model_name, unknown_model
from aim_runtime.models.entry import RANK, ModelEntry
from aim_runtime.models.eviction import DoesNotFit, Loaded, evictable, room

logger = logging.getLogger("aim.server")

#: Requests in flight of a model that is unloaded, or of a replica that is left, may take as long as this.
DRAIN_S = 300.0
#: So long a model must have been loaded and unused before it makes way for another.
COOLDOWN_S = 60.0
SERVED = frozenset({State.LOADING, State.READY, State.UNLOADING, State.FAILED})

Eviction = Literal["never", "idle"]


class Admit(Protocol):
    def __call__(self, entry: ModelEntry, *, without: Collection[str] = ()) -> None:
        """Asked before anything of ``entry`` is started. ``without``: as if those models had left.

        Raises:
            DoesNotFit: one line with the shortfall.
        """
        ...


class Audit(Protocol):
    def __call__(self, action: str, **fields: Any) -> None: ...


def _admit_all(entry: ModelEntry, *, without: Collection[str] = ()) -> None:
    return None


def _to_the_log(action: str, **fields: Any) -> None:
    logger.info("%s %s", action, " ".join(f"{name}={value}" for name, value in fields.items()))


@dataclass(eq=False)
class _Held:
    """What the directory knows of one name. ``model`` is None while it is not served; ``reason``: why it is not."""

    entry: ModelEntry
    model: RuntimeModel | None = None
    reason: str = ""
    evicted: bool = False
    loaded_s: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def state(self) -> State:
        if self.model is not None:
            return self.model.state
        return State.EVICTED if self.evicted else State.UNAVAILABLE


class Models:
    """See the module.

    Args:
        entries: every model that may be served; those ``at_start`` are loaded by :meth:`load_async`.
        metrics: makes a model's metrics, by its served name and engine.
        admit: asked before a load; see :class:`Admit`.
        audit: told every load and unload.
        gate: makes what a model asks before it admits a request, by its engine, devices and memory.
        eviction: ``idle``: idle models of a lower priority make way for one that does not fit.
        strict_fields: refuse unknown fields of bodies.
        cooldown_s, drain_s: seconds; see the constants.

    Raises:
        ValueError: no entry, or one name twice.
    """

    def __init__(
        self,
        entries: Sequence[ModelEntry],
        *,
        metrics: Callable[..., Metrics] = Metrics,
        admit: Admit = _admit_all,
        audit: Audit = _to_the_log,
        gate: Callable[[Engine, Sequence[Device], int | None], Gate] | None = None,
        eviction: Eviction = "never",
        strict_fields: bool = False,
        cooldown_s: float = COOLDOWN_S,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._metrics = metrics
        self._admit = admit
        self._audit = self.audit = audit
        self._gate = gate
        self._eviction = eviction
        self._strict_fields = strict_fields
        self._cooldown_s = cooldown_s
        self._drain_s = drain_s
        self._admitting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = False
        self._held = {entry.name: _Held(entry) for entry in entries}
        self._by_name = _unique_names(self._held.values())
        for held in self._held.values():
            if held.entry.at_start:
                held.model = self._new_model(held.entry)

    # --- asking -------------------------------------------------------------------------------------------------

    def find(self, body: Json) -> RuntimeModel:
        """The model that ``body["model"]`` means; the only served one where the body names none.

        Raises:
            NotFound: no such model, or it is not loaded.
            BadRequest: it names none, and several are served.
            Unavailable: it has been unloaded to make room.
        """
        asked = body.get("model")
        served = self.served
        if len(served) == 1 and not (isinstance(asked, str) and asked in self._by_name):
            return served[0]  # which refuses what it is not
        if asked is None:
            raise BadRequest(
                f"model: missing, and this server has {len(served)} models: give one of {', '.join(self.names)}",
                param="model",
                code="model_missing",
            )
        check_model_name(asked)
        return self.get(asked)

    def get(self, name: str) -> RuntimeModel:
        """The served model of that name, alias or adapter.

        Raises:
            NotFound: no such model, or it is not loaded.
            Unavailable: it has been unloaded to make room.
        """
        held = self._by_name.get(name)
        if held is None:
            model = next((model for model in self.served if name in model.runs_on.adapters), None)
            if model is None:
                raise unknown_model(name, self.names)
            return model
        if held.model is None:
            raise self._not_loaded(held)
        return held.model

    def _not_loaded(self, held: _Held) -> ServingError:
        why = f" ({held.reason})" if held.reason else ""
        how = f"POST /v2/repository/models/{held.entry.name}/load loads it"
        if held.evicted:
            return Unavailable(f"model {held.entry.name} is not loaded{why}: {how}", code="model_not_loaded")
        names = ", ".join(self.names) or "none"
        return NotFound(
            f"model {held.entry.name!r} is not loaded{why}: {how}; this server has: {names}",
            param="model",
            code="model_not_found",
        )

    @property
    def served(self) -> list[RuntimeModel]:
        """Loading, ready, leaving or failed, in the order of the entries."""
        return [held.model for held in self._held.values() if held.model is not None]

    @property
    def names(self) -> tuple[str, ...]:
        """What ``body["model"]`` may say now."""
        return tuple(name for model in self.served for name in model.names)

    def has_operation(self, operation: str) -> bool:
        """Whether any served model has it."""
        return any(operation in model.runs_on.operations for model in self.served)

    def refusal(self) -> Unavailable | None:
        """Why the server is not ready: the first model that should serve and does not; None if all do."""
        if not self.served:
            return Unavailable("no model is loaded: POST /v2/repository/models/NAME/load loads one")
        return next((refusal for model in self.served if (refusal := model.refusal())), None)

    def alive(self) -> bool:
        """False once every model that was loaded has died, and nobody starts one again: only a new process helps. One
        that died among others is no reason to end those."""
        return not self.served or any(model.alive() for model in self.served)

    def by_name(self) -> dict[str, Model]:
        """Every name that KServe's routes serve → its model."""
        return {
            name: model if name == model.name else NamedModel(name, model)
            for model in self.served
            for name in model.names
        }

    def kserve_model(self, name: str) -> Model:
        """The same for one name. Raises as :meth:`get`."""
        model = self.get(name)
        return model if name == model.name else NamedModel(name, model)

    def states(self) -> dict[str, State]:
        """Served name → its state."""
        return {name: held.state for name, held in self._held.items()}

    def reasons(self) -> dict[str, str]:
        """Name → why it is not ready, empty where it is."""
        return {name: _reason(held) for name, held in self._held.items()}

    # --- loading ------------------------------------------------------------------------------------------------

    async def load(self, name: str) -> None:
        """Load a model that is known; return when it is ready. Goes on if the caller leaves.

        Raises:
            NotFound: no such model.
            ServingError: 409, it does not fit: with the shortfall. Nothing has changed.
            BadRequest: it cannot be loaded; says why.
            Unavailable: the server is ending.
        """
        held = self._known(name)
        try:
            await self._to_its_end(self._load(held))
        except DoesNotFit as error:
            raise ServingError(f"model {name}: {error}", status=409, code="does_not_fit") from error
        except StartupError as error:
            raise BadRequest(str(error), code="model_load_failed") from error

    async def unload(self, name: str) -> None:
        """Let requests in flight finish, at most ``drain_s`` seconds, and free everything.

        Raises:
            NotFound: no such model.
            NotImplementedError: it is the only one: the process would stay without a model.
            ServingError: a part of it does not end.
        """
        held = self._known(name)
        if len(self._held) == 1:
            raise NotImplementedError(
                f"model {name} lives as long as this process: scale or delete its InferenceService"
            )
        await self._to_its_end(self._unload_in_turn(held))

    def _known(self, name: str) -> _Held:
        if self._ending:
            raise Unavailable("the server is shutting down")
        held = self._held.get(name)
        if held is None:
            raise NotFound(
                f"model {name!r} does not exist; this server knows: {', '.join(self._held)}", code="model_not_found"
            )
        return held

    async def _to_its_end(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _load(self, held: _Held) -> None:
        async with held.turn:
            model = held.model
            if model is not None and model.state is State.READY and (model.refusal() is None or model.alive()):
                return  # or being started again by who watches it
            started_s = time.monotonic()
            try:
                await self._load_now(held)
            except BaseException as error:
                self._audit("load", model=held.entry.name, outcome="refused", reason=str(error) or repr(error))
                raise
            self._audit("load", model=held.entry.name, outcome="ok", seconds=round(time.monotonic() - started_s, 3))

    async def _load_now(self, held: _Held) -> None:
        if held.model is not None and held.model.state is not State.LOADING:  # it failed, or died
            await self._unload(held, "loaded again")
        async with self._admitting:
            await self._make_room(held.entry)
            held.model = held.model or self._new_model(held.entry)
        logger.info("model %s: loading", held.entry.name)
        try:
            await held.model.load_async()
        except Exception as error:
            await _failed(held.model, str(error) or repr(error))
            raise
        held.loaded_s = time.monotonic()
        held.reason, held.evicted = "", False
        settle_heap()
        logger.info("model %s: ready", held.entry.name)

    def _new_model(self, entry: ModelEntry) -> RuntimeModel:
        launch = entry.launches[0]
        engine = launch.create()
        return RuntimeModel(
            entry.name,
            engine,
            self._metrics(entry.name, engine, devices=launch.devices),
            gate=self._gate and self._gate(engine, launch.devices, launch.memory_bytes),
            aliases=entry.aliases,
            strict_fields=self._strict_fields,
        )

    async def _make_room(self, entry: ModelEntry) -> None:
        """Raises DoesNotFit: nothing has been unloaded then."""
        for name in room(lambda without: self._admit(entry, without=without), self._candidates(entry)):
            logger.info("model %s makes room for %s", name, entry.name)
            await self._evict(self._held[name], entry.name)

    def _candidates(self, entry: ModelEntry) -> list[str]:
        if self._eviction == "never":
            return []
        loaded = [
            Loaded(
                held.entry.name,
                RANK[held.entry.priority],
                held.model.in_flight.count,
                held.model.last_used_s,
                held.loaded_s,
            )
            for held in self._held.values()
            if held.model is not None and held.model.state is State.READY and not held.turn.locked()
        ]
        return evictable(loaded, RANK[entry.priority], time.monotonic(), self._cooldown_s)

    async def _evict(self, held: _Held, for_model: str) -> None:
        if held.turn.locked():  # waiting for it could be waiting for each other
            raise DoesNotFit(f"{held.entry.name}, which would make room, is being loaded or unloaded: ask again")
        async with held.turn:
            await self._unload(held, f"unloaded to make room for {for_model}")
            held.evicted = True
            self._audit("evict", model=held.entry.name, outcome="ok", made_room_for=for_model)

    async def _unload_in_turn(self, held: _Held) -> None:
        async with held.turn:
            try:
                await self._unload(held, "unloaded")
            except ServingError as error:
                self._audit("unload", model=held.entry.name, outcome="failed", reason=error.message)
                raise
            held.evicted = False
            self._audit("unload", model=held.entry.name, outcome="ok")

    async def _unload(self, held: _Held, reason: str) -> None:
        model = held.model
        if model is None:
            return
        model.start_draining()
        await model.drain(self._drain_s)
        try:
            await model.close()
        except ShutdownError as error:
            model.state, model.failure = State.FAILED, f"it does not end: {error}"
            raise ServingError(f"model {model.name}: {error}; its memory is not free", code="does_not_end") from error
        model.metrics.remove()
        held.model, held.reason = None, reason
        settle_heap(left=True)

    # --- the process's life -------------------------------------------------------------------------------------

    async def load_async(self) -> None:
        """Load what is to be served from the start, the most important first.

        Raises:
            StartupError: none of them can be loaded. One that cannot, among others, is failed and they serve.
        """
        first = sorted(
            (held for held in self._held.values() if held.entry.at_start), key=lambda held: -RANK[held.entry.priority]
        )
        results = await asyncio.gather(*map(self._load_at_start, first), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures:
            if not isinstance(failure, StartupError):
                raise failure
        if failures and len(failures) == len(first):
            raise StartupError("\n".join(map(str, failures)))

    async def _load_at_start(self, held: _Held) -> None:
        try:
            await self._load(held)
        except DoesNotFit as error:
            failure = StartupError(f"model {held.entry.name}: {error}")
        except StartupError as error:
            failure = error
        else:
            return
        if held.model is not None:
            await _failed(held.model, str(failure))
        logger.error("%s", failure)
        raise failure

    def start_draining(self) -> None:
        self._ending = True
        for model in self.served:
            model.start_draining()

    async def drain(self, timeout_s: float) -> None:
        await asyncio.gather(*(model.drain(timeout_s) for model in self.served))

    async def close(self) -> None:
        """Raises ShutdownError, one line, where a part of a model does not end; all have been asked to."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        results = await asyncio.gather(*(model.close() for model in self.served), return_exceptions=True)
        failures = [
            f"model {model.name}: {result}" if isinstance(result, ShutdownError) else result
            for model, result in zip(self.served, results, strict=True)
            if result is not None
        ]
        for failure in failures:
            if isinstance(failure, BaseException):
                raise failure
        if failures:
            raise ShutdownError("; ".join(map(str, failures)))


async def _failed(model: RuntimeModel, reason: str) -> None:
    """It keeps its name, to say why; what it holds is freed."""
    model.state, model.failure = State.FAILED, model.failure or reason
    try:
        await model.close()
    except ShutdownError as error:
        logger.error("model %s: %s", model.name, error)


def _reason(held: _Held) -> str:
    if held.model is None:
        return held.reason or "not loaded"
    if held.model.state is State.FAILED:
        return held.model.failure
    refusal = held.model.refusal()
    return refusal.message if refusal else ""


def _unique_names(held: Iterable[_Held]) -> dict[str, _Held]:
    by_name: dict[str, _Held] = {}
    for one in held:
        for name in (one.entry.name, *one.entry.aliases):
            if name in by_name:
                raise ValueError(f"{name!r} names both {by_name[name].entry.name} and {one.entry.name}")
            by_name[name] = one
    if not by_name:
        raise ValueError("no model to serve")
    return by_name
