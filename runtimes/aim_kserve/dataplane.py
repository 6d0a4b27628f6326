"""KServe's data plane and model repository, telling the truth about one model that loads once."""

from __future__ import annotations

import struct
from typing import Any

from aim_kserve.errors import BadRequest, Unavailable
from aim_kserve.http import JSON_LENGTH, json_length
from aim_kserve.kserve import DataPlane, InferenceRequest, InferRequest, ModelNotFound, ModelRepositoryExtension


class TruthfulDataPlane(DataPlane):  # type: ignore[misc]  # KServe ships no types
    """Ready when every model is, alive while no model has died, and malformed V2 bodies are the client's error."""

    async def ready(self) -> bool:
        models = self.model_registry.get_models()
        return bool(models) and all([await model.healthy() for model in models.values()])

    async def live(self) -> dict[str, str]:  # static in KServe, which never looks at its models
        """A model may have ``alive() -> bool``; False means that only a new process helps."""
        for model in self.model_registry.get_models().values():
            if hasattr(model, "alive") and not model.alive():
                return {"status": f"model {model.name} has died"}
        return {"status": "alive"}

    def decode_inference_request(self, body: Any, headers: Any, model_name: str) -> InferRequest:
        """KServe reads a binary body's header without checking it: a missing key would be a 500; and it drops the
        fields it does not know: they are left in ``unknown_fields``, for a model that will not ignore them."""
        if isinstance(body, bytes):
            json_length(headers.get(JSON_LENGTH.decode(), str(len(body))).encode("latin-1"), len(body))
        try:
            request = super().decode_inference_request(body, headers, model_name)
            request.unknown_fields = list(body.model_extra or ()) if isinstance(body, InferenceRequest) else []
            return request
        except KeyError as error:
            raise BadRequest(f"the body lacks {error}", param=str(error.args[0])) from error
        except (TypeError, AttributeError, struct.error) as error:
            raise BadRequest(f"the body is not a V2 inference request: {error}") from error


class FixedRepository(ModelRepositoryExtension):  # type: ignore[misc]
    """The repository extension for a process whose model lives as long as the process."""

    async def load(self, model_name: str) -> dict[str, Any]:
        """Nothing to do once the model is ready.

        Raises:
            ModelNotFound: another model.
            Unavailable: it is still loading, or gone.
        """
        model = self._model_registry.get_model(model_name)
        if model is None:
            raise ModelNotFound(model_name)
        if not await model.healthy():
            raise Unavailable(f"model {model_name} is not ready: it is loaded when the process starts, ask again")
        return {"name": model_name, "load": True}

    async def unload(self, model_name: str) -> dict[str, Any]:
        """Refused: the process would stay without a model.

        Raises:
            ModelNotFound: another model.
            NotImplementedError: always, for ours.
        """
        if self._model_registry.get_model(model_name) is None:
            raise ModelNotFound(model_name)
        raise NotImplementedError(
            f"model {model_name} lives as long as this process: scale or delete its InferenceService"
        )
