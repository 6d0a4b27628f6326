"""One name of the directory: its entry, and while it is served, its model and the replicas behind it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from prometheus_client import REGISTRY, CollectorRegistry

from aim_kserve.errors import BadRequest, NotFound, ServingError, ShutdownError, StartupError, Unavailable
from aim_runtime.admission.engine import InTurn
from aim_runtime.engine_gauges import Device, Watched
from aim_runtime.engines.base import Engine, ModelLoadError
from aim_runtime.memory_watch import Gate
from aim_runtime.metrics import Metrics
from aim_runtime.model import RuntimeModel, State
from aim_runtime.models.entry import Launch, ModelEntry
from aim_runtime.replicas.engine import Gates, Replica, Replicas

logger = logging.getLogger("aim.server")


#: A replica's gate, by its engine, devices and memory in bytes.
MakeGate = Callable[[Engine, Sequence[Device], int | None], Gate]
#: A replica's engine behind the queue of its model's service levels.
PutInTurn = Callable[[ModelEntry, Engine, CollectorRegistry], InTurn]


@dataclass(eq=False)
class Held:
    """``model`` is None while it is not served; ``reason``: why it is not. ``turn``: whoever changes it holds it,
    and so many are ``waiting`` for it."""

    entry: ModelEntry
    gate: MakeGate | None = None
    in_turn: PutInTurn | None = None
    model: RuntimeModel | None = None
    replicas: Replicas | None = None
    reason: str = ""
    evicted: bool = False
    loaded_s: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    _watched: dict[Replica, Watched] = field(default_factory=dict)
    _counted_as: dict[str, Metrics] = field(default_factory=dict)
    _registry: CollectorRegistry = REGISTRY

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def state(self) -> State:
        if self.model is not None:
            return self.model.state
        return State.EVICTED if self.evicted else State.UNAVAILABLE

    @property
    def trouble(self) -> str:
        """Why it is not ready, empty where it is."""
        if self.model is None:
            return self.reason or "not loaded"
        if self.model.state is State.FAILED:
            return self.model.failure
        refusal = self.model.refusal()
        return refusal.message if refusal else ""

    @property
    def serving(self) -> Replicas:
        """Its replicas. Raises Unavailable where it does not serve."""
        if self.replicas is None or self.state is not State.READY:
            raise Unavailable(f"model {self.name} is {self.state}: load it first", code="model_not_loaded")
        return self.replicas

    def replica_at(self, place: str | None) -> Replica:
        """The one at that place; None: the only one.

        Raises:
            NotFound: there is none.
            BadRequest: there are several.
            Unavailable: the model does not serve.
        """
        replicas = self.serving.replicas
        places = ", ".join(repr(replica.place) for replica in replicas)
        if place is None and len(replicas) > 1:
            raise BadRequest(f"model {self.name} has replicas at {places}: say which one leaves")
        found = next((replica for replica in replicas if place in (None, replica.place)), None)
        if found is None:
            raise NotFound(f"model {self.name} has no replica at {place!r}: there are {places}")
        return found

    def create(self, registry: CollectorRegistry, *, strict_fields: bool) -> RuntimeModel:
        """Its engines, not loaded yet, under its name. Raises StartupError: one cannot be made."""
        self._registry = registry
        try:
            engine = Replicas([self._replica(launch) for launch in self.entry.launches])
        except ModelLoadError as error:
            raise StartupError(f"model {self.name}: {error}") from error
        metrics = Metrics(self.name, engine, registry, gauges=False)
        self.replicas = engine
        self.model = RuntimeModel(
            self.name,
            engine,
            metrics,
            aliases=self.entry.aliases,
            gate=Gates(engine),
            strict_fields=strict_fields,
        )
        self.watch()
        return self.model

    def counted_as(self, name: str) -> Metrics:
        """The metrics of requests to another name, whose variant it is."""
        found = self._counted_as.get(name)
        if found is None:
            assert self.replicas is not None
            found = Metrics(name, self.replicas, self._registry, variant=self.name, gauges=False)
            self._counted_as[name] = found
        return found

    def _replica(self, launch: Launch) -> Replica:
        engine = launch.create()
        gate = self.gate and self.gate(engine, launch.devices, launch.memory_bytes)
        if self.in_turn is None:
            return Replica(engine, launch.place, gate, launch.prove)
        queued = self.in_turn(self.entry, engine, self._registry)
        replica = Replica(queued, launch.place, gate, launch.prove)
        queued.elsewhere = lambda: self._others_answer(replica)
        return replica

    def _others_answer(self, one: Replica) -> bool:
        return self.replicas is not None and any(
            other is not one and other.answers() for other in self.replicas.replicas
        )

    def watch(self) -> None:
        """Show the gauges of the replicas there are, and of no other."""
        if self.model is None or self.replicas is None:
            return
        devices = {launch.place: launch.devices for launch in self.entry.launches}
        for gone in self._watched.keys() - set(self.replicas.replicas):
            self.model.metrics.unwatch(self._watched.pop(gone))
        for new in set(self.replicas.replicas) - self._watched.keys():
            self._watched[new] = self.model.metrics.watch(
                new.engine, replica=new.place, devices=devices.get(new.place, ())
            )

    async def add(self, to: Launch) -> None:
        """One more replica. Raises BadRequest: it cannot be loaded; nothing has changed."""
        before, replicas = self.entry, self.serving
        self.entry = replace(before, launches=(*before.launches, to))
        try:
            await replicas.add(self._replica(to))
        except BaseException as error:
            self.entry = before
            if isinstance(error, ModelLoadError):
                raise BadRequest(f"model {self.name}: {error}", code="model_load_failed") from error
            raise
        self.watch()

    async def remove(self, old: Replica, drain_s: float) -> None:
        """One replica less. Raises ServingError: a part of it does not end."""
        replicas = self.serving
        self.entry = replace(
            self.entry, launches=tuple(launch for launch in self.entry.launches if launch.place != old.place)
        )
        try:
            await replicas.remove(old, drain_s)
        except ShutdownError as error:
            raise self._does_not_end(error) from error
        finally:
            self.watch()

    async def fail(self, reason: str) -> None:
        """It keeps its name, to say why; what it holds is freed."""
        if self.model is None:
            self.reason = reason
            return
        self.model.state, self.model.failure = State.FAILED, self.model.failure or reason
        try:
            await self.model.close()
        except ShutdownError as error:
            logger.error("model %s: %s", self.name, error)

    async def unload(self, drain_s: float, reason: str) -> None:
        """Let requests in flight finish and free everything. Raises ServingError: a part of it does not end."""
        model = self.model
        if model is None:
            return
        model.start_draining()
        await model.drain(drain_s)
        try:
            await model.close()
        except ShutdownError as error:
            model.state, model.failure = State.FAILED, f"it does not end: {error}"
            raise self._does_not_end(error) from error
        for metrics in (model.metrics, *self._counted_as.values()):
            metrics.remove()
        self._counted_as.clear()
        self._watched.clear()
        self.model, self.replicas, self.reason = None, None, reason

    def _does_not_end(self, error: ShutdownError) -> ServingError:
        return ServingError(f"model {self.name}: {error}; its memory is not free", code="does_not_end")
