"""kopf, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import kopf
from prometheus_client import CollectorRegistry

from .audit import Audit
from .cluster import MANAGER, Cluster
from .operator import Operator
from .settings import AUTHORITY, CERTIFICATE, KEY, Settings

Register = Callable[[kopf.OperatorRegistry, Operator], None]


class Shared(NamedTuple):
    """What parts on different threads share."""

    settings: Settings
    audit: Audit
    metrics: CollectorRegistry


class Part:
    """Handlers and what runs them. listening: called once webhooks are served, for those that have some."""

    def __init__(self, register: Register, shared: Shared, listening: Callable[[], None] | None = None) -> None:
        self._register, self._shared, self._listening = register, shared, listening
        self._stop = threading.Event()

    async def run(self) -> None:
        """Until it is cancelled: then handlers that run may end, no other is begun.

        Raises what kopf raises where the cluster does not let it.
        """
        thread = asyncio.create_task(asyncio.to_thread(asyncio.run, self._kopf()))
        try:
            await asyncio.shield(thread)
        except asyncio.CancelledError:
            self._stop.set()
            await thread
            raise

    async def _kopf(self) -> None:
        settings = self._shared.settings
        async with Cluster() as cluster:
            registry = kopf.OperatorRegistry()
            kopf.on.login(registry=registry)(_login)
            self._register(registry, Operator(settings, cluster, self._shared.audit, self._shared.metrics))
            await kopf.operator(
                registry=registry,
                settings=self._kopf_settings(),
                standalone=True,  # who leads is said by the lease
                namespaces=settings.watched,
                clusterwide=not settings.watched,
                stop_flag=self._stop,
            )

    def _kopf_settings(self) -> kopf.OperatorSettings:
        told = kopf.OperatorSettings()
        told.posting.level = 100  # events are what handlers post, not what they log
        told.persistence.finalizer = "aim.amd.com/operator"
        told.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix="operator.aim.amd.com")
        told.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix="operator.aim.amd.com")
        told.networking.request_timeout = 30
        told.watching.server_timeout = 300
        told.execution.max_workers = 4
        if self._listening is not None:
            self._serve(told)
        return told

    def _serve(self, told: kopf.OperatorSettings) -> None:
        settings = self._shared.settings
        assert settings.certificates is not None
        assert self._listening is not None
        told.admission.server = _Server(
            self._listening,
            addr=settings.host,
            port=settings.webhook_port,
            host=settings.webhook_host,
            certfile=settings.certificates / CERTIFICATE,
            pkeyfile=settings.certificates / KEY,
            cafile=settings.certificates / AUTHORITY,
        )
        if settings.webhook_host:
            told.admission.managed = f"{MANAGER}.aim.amd.com"


class _Server(kopf.WebhookServer):
    """Says when it listens. Certificates that cert-manager renews are read anew by kopf's own server."""

    def __init__(self, listening: Callable[[], None], **given: object) -> None:
        super().__init__(**given)  # type: ignore[arg-type]  # kopf's own keywords, from the one place above
        self._listening = listening

    async def __call__(self, fn: kopf.WebhookFn) -> AsyncIterator[kopf.WebhookClientConfig]:
        async for config in super().__call__(fn):
            self._listening()
            yield config


def _login(settings: kopf.OperatorSettings, **_: object) -> kopf.ConnectionInfo | None:
    """The very files that the client reads (lightkube), whatever other clients are installed."""
    return kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)
