"""The main path: settings → node → profile → sizing → assignment → engine → server.

What imports KServe (a second) is imported by the functions that need it: by then, the engine's process loads already.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aim_kserve import log
from aim_kserve.errors import StartupError
from aim_profile.errors import AimProfileError
from aim_runtime.assignment import Assignment, Refused
from aim_runtime.engines.base import Engine, Prove
from aim_runtime.self_check import proof
from aim_runtime.settings import RuntimeSettings
from aim_runtime.start import check_machine, described, hold, located, prepare, refuse
from aim_runtime.supervisor.create import start_engine

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from starlette.routing import BaseRoute

    from aim_runtime.admission.engine import InTurn
    from aim_runtime.models.directory import Models
    from aim_runtime.models.entry import Launch, ModelEntry
    from aim_runtime.models.held import PutInTurn

logger = logging.getLogger("aim.server")


def run(settings: RuntimeSettings) -> int:
    """Serve the model that ``settings`` name; returns the exit code.

    What is here (node) and what the model needs (facts, profile) become an assignment: which devices, which arguments.
    What does not fit, or is not as the settings say, is refused before anything is loaded.
    """
    log.log_to_stderr()
    set_levels(settings)
    if settings.models is not None:
        return run_several(settings, settings.models)
    try:
        settings = located(settings)
        hold_cached([settings])
        assignment = prepare(settings)
        check_machine(settings)
        for line in described(assignment):
            logger.info("%s", line)
        engine = start_engine(settings, assignment)
    except StartupError as error:
        return refuse(settings, error)
    return serve(settings, engine, _launch(settings, engine, assignment))


def run_several(settings: RuntimeSettings, file: Path) -> int:
    """The same for the models of a file, on the devices that a plan gives them or the first that hold each."""
    from aim_runtime.admin_api import migration_routes
    from aim_runtime.models.assigned import assigned
    from aim_runtime.models.directory import Models
    from aim_runtime.models.file import load_models
    from aim_runtime.models.placed import Destinations, entries_of, where_free
    from aim_runtime.telemetry import Telemetry

    try:
        listed, own = load_models(file, settings)
        assignments = assigned(listed, own, settings.placement)
        check_machine(settings)
        hold_cached(own)
        for assignment in assignments:
            for line in described(assignment):
                logger.info("%s", line)
        entries = entries_of(listed, own, assignments, prove_of)
        telemetry = Telemetry(settings)
        models = Models(
            entries,
            listed.variants,
            admit=where_free(assignments, lambda: models.devices(), planned=settings.placement is not None),
            audit=telemetry.audit,
            gate=telemetry.gate,
            in_turn=put_in_turn(settings, own),
            eviction=settings.eviction,
            strict_fields=settings.strict_fields,
        )
    except AimProfileError as error:
        return refuse(settings, Refused.because(error))
    except StartupError as error:
        return refuse(settings, error)
    with telemetry:
        telemetry.show(models.states)
        destinations = Destinations(listed, own, assignments, prove_of)
        return serve_models(settings, models, migration_routes(models, destinations.at))


def hold_cached(models: Sequence[RuntimeSettings]) -> None:
    """Those of a cache are not pruned while this process lives. Raises Refused."""
    for settings in models:
        held = hold(settings)
        if held is not None:
            logger.info("model %s: from the cache: %s", settings.model_name, held)


def set_levels(settings: RuntimeSettings) -> None:
    """Our own loggers and everybody else's, where the settings say so."""
    log.set_levels(settings.log_levels)


def _launch(settings: RuntimeSettings, engine: Engine, assignment: Assignment) -> Launch:
    from aim_runtime.models.entry import Launch
    from aim_runtime.models.placed import devices_of

    devices = devices_of(assignment)
    return Launch(
        lambda: engine, devices=devices, memory_bytes=assignment.memory_bytes, prove=prove_of(settings, assignment)
    )


def prove_of(settings: RuntimeSettings, assignment: Assignment) -> Prove | None:
    """What the engine of that assignment must show before it is ready, as the settings say."""
    always = settings.self_check == "always"
    check = always or (settings.self_check == "auto" and assignment.evidence.unproven)
    return proof(assignment.model, warm=settings.warm_up, check=check, needed=always)


def serve(settings: RuntimeSettings, engine: Engine, launch: Launch | None = None) -> int:
    """Serve one engine, which is not loaded yet, as the only model; ``launch`` says on what."""
    from aim_runtime.models.directory import Models
    from aim_runtime.models.entry import Launch, ModelEntry
    from aim_runtime.telemetry import Telemetry

    launches = (launch or Launch(lambda: engine),)
    entry = ModelEntry(
        settings.model_name, launches, priority=settings.qos_priority, latency_slo_ms=settings.latency_slo_ms
    )
    try:
        telemetry, in_turn = Telemetry(settings), put_in_turn(settings)
    except AimProfileError as error:
        return refuse(settings, Refused.because(error))
    except StartupError as error:
        return refuse(settings, error)
    with telemetry:
        models = Models(
            [entry],
            strict_fields=settings.strict_fields,
            audit=telemetry.audit,
            gate=telemetry.gate,
            in_turn=in_turn,
        )
        telemetry.show(models.states)
        return serve_models(settings, models)


def put_in_turn(settings: RuntimeSettings, own: Sequence[RuntimeSettings] = ()) -> PutInTurn | None:
    """What puts engines behind queues, where the settings, or one of several models' own, ask for service levels.

    Raises:
        QosPolicyError: the policy cannot be used.
    """
    if not any(each.takes_turns for each in (settings, *own)):
        return None
    from aim_runtime.admission.create import ServiceLevels
    from aim_runtime.qos.policy import policy_of

    levels = ServiceLevels(policy_of(settings.qos_policy))

    def put(entry: ModelEntry, engine: Engine, registry: CollectorRegistry) -> InTurn:
        return levels.in_turn(engine, entry.name, entry.priority, entry.latency_slo_ms, registry)

    return put


def serve_models(settings: RuntimeSettings, models: Models, more: Sequence[BaseRoute] = ()) -> int:
    """Serve until a signal: listen, load behind, answer, drain; returns the exit code."""
    from aim_kserve.server import Server
    from aim_runtime.admin_api import adapter_routes
    from aim_runtime.models.registry import Registry, Repository
    from aim_runtime.openai_api import Operations, model_routes
    from aim_runtime.openapi import described as described_routes

    routes = [*more, *model_routes(models)]
    if settings.runtime_adapters:
        routes += adapter_routes(lambda: models.served, audit=models.audit, directory=settings.adapter_dir)
    operations = partial(Operations, models=models, max_body_bytes=int(settings.max_body_mib * 1024**2))
    server = Server(
        settings,
        routes,
        [operations],
        registry=Registry(models),
        repository=Repository(models),
        describe=partial(described_routes, models=models),
    )
    return server.run(models, partial(refuse, settings, of_several=True))
