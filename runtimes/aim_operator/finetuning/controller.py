"""FineTuningJobs in kopf's registry: a daemon for each, woken by what changes the job or its RayJob."""

from __future__ import annotations

from typing import Any

import kopf

from aim_operator.cluster import FINE_TUNING_JOBS, RAY_JOBS
from aim_operator.loop import Bells, keep
from aim_operator.operator import Operator
from aim_operator.settings import AUTHORITY, Settings

from .objects import Reports
from .reconcile import KIND, Reconciler
from .reports import Server

_JOBS = (*FINE_TUNING_JOBS.api_version.split("/"), FINE_TUNING_JOBS.plural)
_RAY_JOBS = (*RAY_JOBS.api_version.split("/"), RAY_JOBS.plural)


def register(registry: kopf.OperatorRegistry, operator: Operator) -> None:
    """The daemon, and what wakes it."""
    reconciler = Reconciler(operator.cluster, operator.audit, lambda: _reports(operator.settings))
    bells = Bells()

    @kopf.daemon(*_JOBS, registry=registry, cancellation_timeout=10)
    async def fine_tuning_job(name: str, namespace: str | None, **_: Any) -> None:
        key = f"{namespace}/{name}"
        await keep(f"{KIND} {key}", lambda: reconciler.once(name, str(namespace)), bells.of(key))

    @kopf.on.event(*_JOBS, registry=registry)
    async def edited(name: str, namespace: str | None, **_: Any) -> None:
        bells.ring(f"{namespace}/{name}")

    @kopf.on.event(*_RAY_JOBS, registry=registry)
    async def ray_job_moved(name: str, namespace: str | None, **_: Any) -> None:
        bells.ring(f"{namespace}/{name}")


def register_reports(registry: kopf.OperatorRegistry, operator: Operator) -> None:
    """The server that pods tell, where there are certificates for it."""
    settings = operator.settings
    if settings.certificates is None:
        return
    server, certificates = Server(operator.cluster), settings.certificates

    @kopf.on.startup(registry=registry)
    async def started(**_: Any) -> None:
        await server.serve(settings.host, settings.report_port, certificates)

    @kopf.on.cleanup(registry=registry)
    async def ended(**_: Any) -> None:
        await server.close()


def _reports(settings: Settings) -> Reports | None:
    """Where this cluster's pods reach us; None: no certificates, so nobody tells anything."""
    if settings.certificates is None:
        return None
    return Reports(settings.report_url, (settings.certificates / AUTHORITY).read_text(encoding="utf-8"))
