"""KServe's data plane and model repository, telling the truth about models that load in the background."""

from __future__ import annotations

from typing import Any

from aim_kserve.errors import BadRequest, Unavailable
from aim_kserve.http import JSON_LENGTH, json_length
from aim_kserve.identity.permission import may_use
from aim_kserve.kserve import DataPlane, InferRequest, InvalidInput, ModelNotFound, ModelRepositoryExtension
from aim_kserve.v2_body import read_binary


class TruthfulDataPlane(DataPlane):  # type: ignore[misc]  # KServe ships no types
    """Ready when every model is, alive until every model has died, and malformed V2 bodies are the client's error."""

    async def ready(self) -> bool:
        models = self.model_registry.get_models()
        return bool(models) and all([await model.healthy() for model in models.values()])

    async def live(self) -> dict[str, str]:  # static in KServe, which never looks at its models
        """A model may have ``alive() -> bool``; False means that only a new process helps. That would end the models
        that live, too: the process is given up once none does."""
        dead = []
        for model in self.model_registry.get_models().values():
            if not hasattr(model, "alive") or model.alive():
                return {"status": "alive"}
            dead.append(model.name)
        return {"status": f"model {', '.join(dead)} has died" if dead else "alive"}

    def decode(self, body: Any, headers: Any, *arguments: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        """KServe reads a CloudEvent without looking: a list where an object should be would be a 500."""
        try:
            decoded: tuple[Any, dict[str, Any]] = super().decode(body, headers, *arguments, **options)
            return decoded
        except InvalidInput:
            raise
        except KeyError as error:
            raise BadRequest(f"the body lacks {error}", param=str(error.args[0])) from error
        except (AttributeError, TypeError, ValueError) as error:
            raise BadRequest(f"the body is not a CloudEvent, as its headers say: {error}") from error

    def decode_inference_request(self, body: Any, headers: Any, model_name: str) -> InferRequest:
        """The fields that KServe does not know are left in ``unknown_fields``, for a model that will not ignore them;
        it would drop them."""
        length = headers.get(JSON_LENGTH.decode())
        if isinstance(body, bytes) and length is not None:
            return read_binary(body, json_length(length.encode("latin-1"), len(body)), model_name)
        request = super().decode_inference_request(body, headers, model_name)
        request.unknown_fields = list(body.model_extra or ())
        return request


class FixedRepository(ModelRepositoryExtension):  # type: ignore[misc]
    """The repository extension for a process whose model lives as long as the process."""

    async def index(self, filter_ready: bool | None = False) -> list[dict[str, str]]:
        """The model, in Triton's form, if whoever asks may use it."""
        rows = [
            {"name": name, "state": "READY" if await model.healthy() else "UNAVAILABLE", "reason": ""}
            for name, model in self._model_registry.get_models().items()
            if may_use(name)
        ]
        return [row for row in rows if row["state"] == "READY"] if filter_ready else rows

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
