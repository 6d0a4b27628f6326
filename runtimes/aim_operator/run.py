"""The main path: health first, then the webhooks (every replica's), then the controllers (the leader's).

Both are kopf's, each in a thread of its own: a controller that waits or computes delays neither an admission, nor the
lease, nor a probe.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from prometheus_client import CollectorRegistry, Gauge

from . import controllers, webhooks
from .audit import Audit
from .cluster import Cluster
from .health import Health
from .leadership import Leadership, LeadershipLost
from .part import Part, Shared
from .settings import Settings

logger = logging.getLogger("aim.operator")


def run(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Raises SettingsError, or what a part could not go on for."""
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for chatty in ("httpx2", "aiohttp.access"):  # a line for each request
        logging.getLogger(chatty).setLevel(logging.WARNING)
    metrics = CollectorRegistry()
    asyncio.run(_Run(Shared(settings, Audit(settings.audit_log, metrics), metrics)).until_stopped())


class _Run:
    def __init__(self, shared: Shared) -> None:
        self._shared, self._settings = shared, shared.settings
        self._health = Health(shared.metrics)
        self._leads = Gauge("aim_operator_leads", "1: this replica changes things", registry=shared.metrics)

    async def until_stopped(self) -> None:
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        port = await self._health.serve(self._settings.host, self._settings.http_port)
        logger.info("/healthz, /readyz and /metrics on port %d", port)
        async with Cluster() as cluster:
            leadership = Leadership(cluster, self._settings)
            working = [asyncio.create_task(each) for each in (self._webhooks(), self._controllers(leadership))]
            await asyncio.wait([*working, asyncio.create_task(stopped.wait())], return_when=asyncio.FIRST_COMPLETED)
            for task in working:
                task.cancel()
            ended = await asyncio.gather(*working, return_exceptions=True)
            if self._settings.leader_election:
                await leadership.release()
        await self._health.close()
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def _webhooks(self) -> None:
        if self._settings.certificates is None:
            logger.warning("no webhooks: --certificates is not given")
            await asyncio.Event().wait()
        self._health.waits_for("webhooks")
        await Part(webhooks.register, self._shared, lambda: self._health.has("webhooks")).run()

    async def _controllers(self, leadership: Leadership) -> None:
        holding = None
        if self._settings.leader_election:
            await leadership.acquire()
            holding = asyncio.create_task(self._hold(leadership))
        self._leads.set(1)
        try:
            await Part(controllers.register, self._shared).run()
        finally:
            if holding:
                holding.cancel()

    async def _hold(self, leadership: Leadership) -> None:
        try:
            await leadership.hold()
        except LeadershipLost as error:
            # Another may act already: nothing here may finish what it is at, as client-go ends its processes, too.
            logger.critical("%s", error)
            logging.shutdown()
            sys.stderr.flush()
            os._exit(1)
