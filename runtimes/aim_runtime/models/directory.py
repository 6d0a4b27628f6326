"""The directory of models: the only thing that routes, protocols, probes and the repository API ask.

A name is known from the start and served between a load and an unload.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from aim_kserve.errors import BadRequest, NotFound, ServingError, ShutdownError, StartupError, Unavailable
from aim_kserve.identity.permission import forbidden, may_use, tellable
from aim_kserve.kserve import Model
from aim_runtime.engine_gauges import Device
from aim_runtime.engines.base import Json, RequestContext
from aim_runtime.model import NamedModel, RuntimeModel, State, check_model_name, unknown_model
from aim_runtime.models.entry import RANK, Launch, ModelEntry, VariantEntry
from aim_runtime.models.eviction import DoesNotFit
from aim_runtime.models.held import Held, MakeGate, PutInTurn
from aim_runtime.models.loader import Admit, Eviction, Loader, Trail, does_not_fit
from aim_runtime.models.variants import Route, Split, SplitModel, no_variant, sticky_key

logger = logging.getLogger("aim.server")

#: Requests in flight of a model that is unloaded, or of a replica that is left, may take as long as this.
DRAIN_S = 300.0
#: So long a model must have been loaded and unused before it makes way for another.
COOLDOWN_S = 60.0
_AUDITED_CHARACTERS = 200  # of a name that somebody made up


def admit_all(entry: ModelEntry, *, without: Collection[str] = ()) -> None:
    """Every model has been sized and has its place."""


def _to_the_log(action: str, **fields: Any) -> None:
    logger.info("%s: %s", action, " ".join(f"{name}={value}" for name, value in fields.items()))


class Models:
    """See the module.

    Args:
        entries: every model that may be served; those ``at_start`` are loaded by :meth:`load_async`.
        variants: names whose requests are shared out among ``entries``.
        admit: asked before a load; see :class:`Admit`.
        audit: told every load and unload.
        gate: makes what a replica asks before it admits a request, by its engine, devices and memory.
        in_turn: puts a replica's engine behind a queue; None: requests go to the engine as they come.
        eviction: ``idle``: idle models of a lower priority make way for one that does not fit.
        strict_fields: refuse unknown fields of bodies.
        cooldown_s, drain_s: seconds; see the constants.
        registry: where ``/metrics`` looks; tests give their own.

    Raises:
        ValueError: no entry, one name twice, or a variant that is no entry or has no weight.
        StartupError: an engine that is to be loaded at the start cannot be made.
    """

    def __init__(
        self,
        entries: Sequence[ModelEntry],
        variants: Sequence[VariantEntry] = (),
        *,
        admit: Admit = admit_all,
        audit: Trail = _to_the_log,
        gate: MakeGate | None = None,
        in_turn: PutInTurn | None = None,
        eviction: Eviction = "never",
        strict_fields: bool = False,
        cooldown_s: float = COOLDOWN_S,
        drain_s: float = DRAIN_S,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self.audit = audit
        self._ending = False
        self._held = {entry.name: Held(entry, gate, in_turn) for entry in entries}
        self._splits = {entry.name: Split(entry, _variants(entry, self._held)) for entry in variants}
        self._by_name: dict[str, Held | Split] = {}
        names: list[Held | Split] = [*self._held.values(), *self._splits.values()]
        for one in names:
            self._take_names(one)
        self._loader = Loader(
            self._held,
            admit=admit,
            audit=audit,
            eviction=eviction,
            cooldown_s=cooldown_s,
            drain_s=drain_s,
            registry=registry,
            strict_fields=strict_fields,
        )
        for held in self._held.values():
            if held.entry.at_start:
                held.create(registry, strict_fields=strict_fields)

    def _take_names(self, one: Held | Split) -> None:
        for name in (one.name, *one.entry.aliases):
            other = self._by_name.setdefault(name, one)
            if other is not one:
                raise ValueError(f"{name!r} names both {other.name} and {one.name}")

    # --- asking -------------------------------------------------------------------------------------------------

    def route(self, body: Json, context: RequestContext) -> Route:
        """The model that ``body["model"]`` means; the only served one where the body names none.

        Raises:
            NotFound: no such model, or it is not loaded.
            BadRequest: it names none, and several are served.
            Forbidden: whoever asks may not use it.
            Unavailable: it has been unloaded to make room, or no variant of it is ready.
        """
        asked = body.get("model")
        served = self.served
        if len(served) == 1 and not (isinstance(asked, str) and asked in self._by_name):
            self.permit(asked if isinstance(asked, str) else str(served[0].name))
            return Route(served[0])  # which refuses what it is not
        if asked is None:
            raise BadRequest(
                f"model: missing, and this server has {len(served)} models: give one of {', '.join(self.names)}",
                param="model",
                code="model_missing",
            )
        check_model_name(asked)
        self.permit(asked)
        split = self.split(asked)
        if split is None:
            return Route(self.get(asked))
        route = split.route(sticky_key(body, context))
        if route is None:
            raise no_variant(split)
        return route

    def permits(self, name: str) -> bool:
        """Whether whoever asks may use that name. It is the name that counts, whatever stands behind it; an alias is
        also what it stands for."""
        one = self._by_name.get(name)
        return may_use(name) if one is None else may_use(name, one.name)

    def permit(self, name: str, action: str | None = None) -> None:
        """Refuse what may not be used; where it is an admin ``action``, the audit is told.

        Raises:
            Forbidden: whoever asks may not use that name, whether or not there is such a model.
        """
        if self.permits(name):
            return
        refusal = forbidden(name, self.names)
        if action is not None:
            self.audit(action, model=name[:_AUDITED_CHARACTERS], outcome="refused", reason=refusal.message)
        raise refusal

    def split(self, name: str) -> Split | None:
        """The name with variants; None where it is not one."""
        found = self._by_name.get(name)
        return found if isinstance(found, Split) else None

    @property
    def splits(self) -> list[Split]:
        """The names with variants."""
        return list(self._splits.values())

    def get(self, name: str) -> RuntimeModel:
        """The served model of that name, alias or adapter.

        Raises:
            NotFound: no such model, or it is not loaded.
            Unavailable: it has been unloaded to make room.
        """
        held = self._by_name.get(name)
        if isinstance(held, Held):
            if held.model is None:
                raise self._not_loaded(held)
            return held.model
        model = next((model for model in self.served if name in model.runs_on.adapters), None)
        if model is None:
            raise unknown_model(name, self.names)
        return model

    def _not_loaded(self, held: Held) -> ServingError:
        why = f" ({held.reason})" if held.reason else ""
        how = f"POST /v2/repository/models/{held.entry.name}/load loads it"
        if held.evicted:
            return Unavailable(f"model {held.entry.name} is not loaded{why}: {how}", code="model_not_loaded")
        names = tellable(self.names)
        rest = f"; this server has: {names}" if names else ""
        return NotFound(
            f"model {held.entry.name!r} is not loaded{why}: {how}{rest}",
            param="model",
            code="model_not_found",
        )

    @property
    def served(self) -> list[RuntimeModel]:
        """Loading, ready, leaving or failed, in the order of the entries."""
        return [held.model for held in self._held.values() if held.model is not None]

    @property
    def names(self) -> tuple[str, ...]:
        """What ``body["model"]`` may say now, of what whoever asks may use."""
        return tuple(filter(self.permits, self._all_names()))

    def _all_names(self) -> tuple[str, ...]:
        models = (name for model in self.served for name in model.names)
        return (*models, *(name for split in self.splits for name in (split.name, *split.entry.aliases)))

    def has_operation(self, operation: str) -> bool:
        """Whether any served model has it."""
        return any(operation in model.runs_on.operations for model in self.served)

    def refusal(self) -> Unavailable | None:
        """Why the server is not ready: the first model that should serve and does not; None if all do."""
        if not self.served:
            return Unavailable("no model is loaded: POST /v2/repository/models/NAME/load loads one")
        return next((refusal for model in self.served if (refusal := model.refusal())), None)

    def refusal_of(self, name: str) -> Unavailable | None:
        """Why a name, alias, adapter or name with variants cannot be served now; None if it can. Raises as
        :meth:`get`."""
        split = self.split(name)
        if split is not None:
            return None if split.ready else no_variant(split)
        return self.get(name).refusal()

    def alive(self) -> bool:
        """False once every model that was loaded has died, and nobody starts one again: only a new process helps. One
        that died among others is no reason to end those."""
        return not self.served or any(model.alive() for model in self.served)

    def by_name(self) -> dict[str, Model]:
        """Every name that KServe's routes serve → its model."""
        return {name: self.kserve_model(name) for name in self.names}

    def kserve_model(self, name: str) -> Model:
        """The same for one name. Raises as :meth:`get`, and as :meth:`permit`."""
        self.permit(name)
        split = self.split(name)
        if split is not None:
            return SplitModel(name, split)
        model = self.get(name)
        return model if name == model.name else NamedModel(name, model)

    def states(self) -> dict[str, State]:
        """Served name → its state."""
        return {name: held.state for name, held in self._held.items()}

    def devices(self) -> dict[str, tuple[Device, ...]]:
        """Served name → the devices of its replicas, for every model that takes memory now."""
        holding = (State.LOADING, State.READY, State.UNLOADING)
        return {
            name: tuple(device for launch in held.entry.launches for device in launch.devices)
            for name, held in self._held.items()
            if held.state in holding
        }

    def reasons(self) -> dict[str, str]:
        """Name → why it is not ready, empty where it is."""
        return {name: held.trouble for name, held in self._held.items()}

    # --- loading ------------------------------------------------------------------------------------------------

    async def load(self, name: str) -> None:
        """Load a model that is known; return when it is ready. Goes on if the caller leaves.

        Raises:
            Forbidden: whoever asks may not use it.
            NotFound: no such model.
            ServingError: 409, it does not fit: with the shortfall. Nothing has changed.
            BadRequest: it cannot be loaded; says why.
            Unavailable: the server is ending; or it is loaded, and its engine is being started again.
        """
        held = self._known(name, "load")
        try:
            await self._loader.load(held)
        except DoesNotFit as error:
            raise does_not_fit(name, error) from error
        except StartupError as error:
            raise BadRequest(str(error), code="model_load_failed") from error

    async def unload(self, name: str) -> None:
        """Let requests in flight finish, at most ``drain_s`` seconds, and free everything.

        Raises:
            NotFound: no such model.
            NotImplementedError: it is the only one: the process would stay without a model.
            ServingError: a part of it does not end.
        """
        held = self._known(name, "unload")
        if len(self._held) == 1:
            raise NotImplementedError(
                f"model {name} lives as long as this process: scale or delete its InferenceService"
            )
        await self._loader.unload(held)

    async def migrate(self, name: str, to: Launch, leaving: str | None = None) -> None:
        """Load a replica at another place, send requests there, and free the old one once its own are done.

        Args:
            to: the new replica.
            leaving: the place of the one that goes; None: the only one.

        Raises:
            NotFound: no such model, or no replica there.
            BadRequest: several replicas and none named; or the new one cannot be loaded: nothing has changed.
            Unavailable: the model does not serve.
            ServingError: 409, it does not fit beside the old one: nothing has changed.
        """
        await self._loader.migrate(self._known(name, "migrate"), to, leaving)

    async def add_replica(self, name: str, to: Launch) -> None:
        """Load one more. Raises as :meth:`migrate`."""
        await self._loader.add_replica(self._known(name, "add_replica"), to)

    async def remove_replica(self, name: str, leaving: str) -> None:
        """Send it no more requests and free it once its own are done.

        Raises:
            NotFound: no such model, or no replica at that place.
            BadRequest: it is the last one.
            Unavailable: the model does not serve.
        """
        await self._loader.remove_replica(self._known(name, "remove_replica"), leaving)

    def _known(self, name: str, action: str) -> Held:
        if self._ending:
            raise Unavailable("the server is shutting down")
        self.permit(name, action)
        held = self._held.get(name)
        if held is None:
            if name in self._splits:
                variants = ", ".join(self._splits[name].entry.weights)
                raise BadRequest(f"model {name} has variants: load or unload one of those: {variants}")
            raise NotFound(
                f"model {name!r} does not exist; this server knows: {', '.join(filter(self.permits, self._held))}",
                code="model_not_found",
            )
        return held

    # --- the process's life -------------------------------------------------------------------------------------

    async def load_async(self) -> None:
        """Load what is to be served from the start, the most important first.

        Raises:
            StartupError: none of them can be loaded. One that cannot, among others, is failed and they serve.
        """
        first = sorted(
            (held for held in self._held.values() if held.entry.at_start), key=lambda held: -RANK[held.entry.priority]
        )
        results = await asyncio.gather(*map(self._loader.load_at_start, first), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures:
            if not isinstance(failure, StartupError):
                raise failure
        if failures and len(failures) == len(first):
            raise StartupError("\n".join(map(str, failures)))

    def start_draining(self) -> None:
        self._ending = True
        for model in self.served:
            model.start_draining()

    async def drain(self, timeout_s: float) -> None:
        await asyncio.gather(*(model.drain(timeout_s) for model in self.served))

    async def close(self) -> None:
        """Raises ShutdownError, one line, where a part of a model does not end; all have been asked to."""
        await self._loader.stop()
        served = self.served
        results = await asyncio.gather(*(model.close() for model in served), return_exceptions=True)
        stuck = []
        for model, result in zip(served, results, strict=True):
            if isinstance(result, ShutdownError):
                stuck.append(f"model {model.name}: {result}")
            elif result is not None:
                raise result
        if stuck:
            raise ShutdownError("; ".join(stuck))


def _variants(entry: VariantEntry, held: Mapping[str, Held]) -> dict[str, Held]:
    """Raises ValueError: one is no entry, or has no weight."""
    if not entry.weights:
        raise ValueError(f"{entry.name}: give at least one variant")
    for name, weight in entry.weights.items():
        if name not in held:
            raise ValueError(f"{entry.name}: no model is named {name!r}; there are: {', '.join(held)}")
        if not 0 < weight < math.inf:
            raise ValueError(f"{entry.name}: the weight of {name} must be a number > 0 (got {weight})")
    return {name: held[name] for name in entry.weights}
