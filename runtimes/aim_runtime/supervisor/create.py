"""Whether an engine runs in a process of its own or in ours (docs/adr/0003-supervised-engines.md)."""

from __future__ import annotations

import os
from dataclasses import replace

from aim_kserve.errors import StartupError
from aim_runtime.assignment import Assignment
from aim_runtime.choose import create_engine, spec_of
from aim_runtime.engines import registry
from aim_runtime.engines.base import Engine, ModelLoadError
from aim_runtime.settings import RuntimeSettings

from .launch import Launch
from .remote import RemoteEngine

#: These compute in processes of their own anyway, and their front end would only move one hop further away.
_SPLIT_BY_THEMSELVES = frozenset({"vllm"})
_STALL_TIMEOUT_S = 60.0


def start_engine(settings: RuntimeSettings, assignment: Assignment | None = None) -> Engine:
    """The one engine of ``settings``, as it was assigned. One in a process of its own has begun to load already, while
    we import a server; ``load`` waits for it.

    Raises:
        StartupError: no model of a known format, the engine is not installed, or a setting belongs to another one.
    """
    spec = spec_of(settings, assignment)
    env = assignment.env if assignment is not None else {}
    cpus = frozenset(assignment.cpus or ()) if assignment is not None else frozenset()
    if not supervised(settings, spec.engine):
        os.environ.update(env)
        if cpus:
            os.sched_setaffinity(0, cpus)  # its own processes inherit it
        return create_engine(settings, assignment)
    try:
        registry.check(spec)
        memory_bytes = assignment.memory_bytes if assignment is not None else None
        engine = remote_engine(settings, Launch(spec, env=env, cpus=cpus or None, memory_bytes=memory_bytes))
        engine.spawn()
        return engine
    except ModelLoadError as error:
        raise StartupError(str(error)) from None


def supervised(settings: RuntimeSettings, engine: str) -> bool:
    """Whether a single model on ``engine`` gets a process of its own. Several models always do: each may need another
    environment, other devices, another interpreter."""
    if settings.supervise == "auto":
        return engine not in _SPLIT_BY_THEMSELVES and not _is_elsewhere(settings, engine)
    return settings.supervise == "always"


def _is_elsewhere(settings: RuntimeSettings, engine: str) -> bool:
    """Somebody else's server that is there already: no process of ours could be started again for it."""
    return bool(settings.engine_options(engine).get("server_url"))


def remote_engine(settings: RuntimeSettings, launch: Launch) -> RemoteEngine:
    """An engine in a process of its own, not started yet, with the bounds that ``settings`` give."""
    return RemoteEngine(
        replace(launch, log_levels=settings.log_levels),
        start_timeout_s=settings.start_timeout,
        stall_timeout_s=float(launch.spec.options.get("stall_timeout") or _STALL_TIMEOUT_S),
    )
