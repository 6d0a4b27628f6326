"""The transformer as a ``kserve.Model``: V1, V2 REST and gRPC, and its life."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

from aim_guardrail.pipeline import DetectorFailed, Guard
from aim_guardrail.settings import GuardrailSettings
from aim_guardrail.upstream import Upstream
from aim_kserve.errors import StartupError, Unavailable
from aim_kserve.kserve import Model


class GuardrailModel(Model):  # type: ignore[misc]  # KServe ships no types
    """Ready once its guard is loaded.

    Args:
        loading: the guard, being loaded.
    """

    def __init__(self, settings: GuardrailSettings, upstream: Upstream, loading: Awaitable[Guard]) -> None:
        super().__init__(settings.model_name, return_response_headers=True)
        self.upstream = upstream
        self._loading = loading
        self._guard: Guard | None = None
        self._draining = False

    async def load_async(self) -> None:
        await self.upstream.start()
        try:
            self._guard = await self._loading
        except DetectorFailed as error:
            raise StartupError(f"the guardrail cannot be loaded: {error}") from error
        self.ready = True

    @property
    def guard(self) -> Guard:
        """The guard in force.

        Raises:
            Unavailable: it is still loading, or the process is ending.
        """
        if self._draining:
            raise Unavailable("the guardrail is shutting down: ask again, another replica will answer")
        if self._guard is None:
            raise Unavailable("the guardrail is still loading: ask again")
        return self._guard

    async def healthy(self) -> bool:
        return self._guard is not None and not self._draining

    def load(self) -> bool:
        """KServe's way to load a model that is not ready, per request: ours loads once, in the background."""
        return self._guard is not None

    def start_draining(self) -> None:
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.upstream.in_use and time.monotonic() < deadline:  # noqa: ASYNC110  a counter without an event
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        await self.upstream.close()

    async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        raise NotImplementedError
