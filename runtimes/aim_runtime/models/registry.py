"""KServe's two views of the directory: its model registry and its model repository."""

from __future__ import annotations

from typing import Any

from aim_kserve.kserve import Model, ModelRepository, ModelRepositoryExtension
from aim_runtime.model import State
from aim_runtime.models.directory import Models

#: Triton's words: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md
_TRITON = {
    State.LOADING: "LOADING",
    State.READY: "READY",
    State.UNLOADING: "UNLOADING",
    State.UNAVAILABLE: "UNAVAILABLE",
    State.FAILED: "UNAVAILABLE",
    State.EVICTED: "UNAVAILABLE",
}


class Registry(ModelRepository):  # type: ignore[misc]  # KServe ships no types
    """What V1, V2 REST and gRPC look names up in: names come and go with the directory's."""

    def __init__(self, models: Models) -> None:
        super().__init__()
        self._directory = models

    def get_model(self, name: str) -> Model:
        """Raises as :meth:`Models.kserve_model`, instead of KServe's None: a client is told what there is."""
        return self._directory.kserve_model(name)

    def get_models(self) -> dict[str, Model]:
        return self._directory.by_name()

    async def is_model_ready(self, name: str) -> bool:
        return bool(await self.get_model(name).healthy())


class Repository(ModelRepositoryExtension):  # type: ignore[misc]
    """Load and unload at run time, over REST and gRPC."""

    def __init__(self, models: Models) -> None:
        super().__init__(Registry(models))
        self._directory = models

    async def index(self, filter_ready: bool | None = False) -> list[dict[str, str]]:
        """Every model that is known and that whoever asks may use, in Triton's form. An engine that has died is
        UNAVAILABLE."""
        reasons = self._directory.reasons()
        rows = [
            {"name": name, "state": _state(state, reasons[name]), "reason": reasons[name]}
            for name, state in self._directory.states().items()
            if self._directory.permits(name)
        ]
        return [row for row in rows if row["state"] == "READY"] if filter_ready else rows

    async def load(self, model_name: str) -> dict[str, Any]:
        """Raises as :meth:`Models.load`."""
        await self._directory.load(model_name)
        return {"name": model_name, "load": True}

    async def unload(self, model_name: str) -> dict[str, Any]:
        """Raises as :meth:`Models.unload`."""
        await self._directory.unload(model_name)
        return {"name": model_name, "unload": True}


def _state(state: State, reason: str) -> str:
    return "UNAVAILABLE" if state is State.READY and reason else _TRITON[state]
