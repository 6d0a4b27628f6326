"""/healthz, /readyz and /metrics over HTTP.

Alive is whoever answers. Ready is who serves what it is there for: webhooks on every replica, the controllers on the
one that leads; a replica that waits for the lease is ready, so that a rollout does not wait for it.
"""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


class Health:
    """What is not ready yet, by name; and the server that says so."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._waiting: set[str] = set()
        self._runner: web.AppRunner | None = None

    def waits_for(self, part: str) -> None:
        self._waiting.add(part)

    def has(self, part: str) -> None:
        self._waiting.discard(part)

    async def serve(self, host: str, port: int) -> int:
        """The port it listens on. Raises OSError."""
        application = web.Application()
        application.add_routes(
            [web.get("/healthz", self._alive), web.get("/readyz", self._ready), web.get("/metrics", self._metrics)]
        )
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _alive(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        missing = sorted(self._waiting)
        return web.Response(
            text=f"waiting for {', '.join(missing)}\n" if missing else "ok\n", status=503 if missing else 200
        )

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
