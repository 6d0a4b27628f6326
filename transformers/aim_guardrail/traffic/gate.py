"""The limits of a process: what every request's visit needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aim_guardrail.metrics import Metrics
from aim_guardrail.traffic.counters import Counters
from aim_guardrail.traffic.estimate import AnswerLength
from aim_guardrail.traffic.geo import GeoDatabase
from aim_guardrail.traffic.shared import SharedWindows
from aim_kserve.errors import StartupError

if TYPE_CHECKING:
    from aim_guardrail.settings import GuardrailSettings

#: Names that are counted each for itself; whoever makes more up is counted under one.
_MOST_MODELS = 1024
_UNKNOWN = "\1unknown"


class Traffic:
    """What is there once for all requests.

    Args:
        service: whose limits these are, and the model of a request that names none.
    """

    def __init__(
        self,
        metrics: Metrics,
        service: str = "",
        *,
        counters: Counters | None = None,
        geo_file: Path | None = None,
    ) -> None:
        self.metrics, self.service = metrics, service
        self.geo: GeoDatabase | None = None
        self._geo_file = geo_file
        self.counters = counters or Counters(metrics)
        self.answer_length = AnswerLength()
        self._models = {service}

    @classmethod
    def of(cls, settings: GuardrailSettings, metrics: Metrics, clock: Callable[[], float] | None = None) -> Traffic:
        """As the settings say. No connection is made yet."""
        timeout_s = settings.redis_timeout_ms / 1000
        shared = SharedWindows(settings.redis_url, timeout_s) if settings.redis_url else None
        counters = Counters(metrics, shared, settings.limit_replicas, clock)
        return cls(metrics, settings.model_name, counters=counters, geo_file=settings.geo_database)

    def open(self) -> None:
        """Open the database of countries, where there is one. Raises StartupError."""
        if self._geo_file is None:
            return
        try:
            self.geo = GeoDatabase(self._geo_file)
        except ValueError as error:
            raise StartupError(f"--geo_database {self._geo_file}: {error}") from error

    def counted_model(self, name: str) -> str:
        """By which name requests for a model are counted: names that no predictor has answered by are one."""
        return name if name in self._models else _UNKNOWN

    def learn_model(self, name: str) -> None:
        """The predictor has answered by that name: from now on it is counted for itself."""
        if len(self._models) < _MOST_MODELS:
            self._models.add(name)

    async def close(self) -> None:
        await self.counters.close()
        if self.geo is not None:
            self.geo.close()
