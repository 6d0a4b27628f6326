"""What changes a server that serves: LoRA adapters come and go (vLLM's own two routes, for every engine that takes
adapters), and a model moves to another device.

They are admin actions, told to the audit trail. Those of adapters are served with ``--runtime_adapters`` only. Who may
reach them is the cluster's business (docs/adapters.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from aim_kserve.errors import BadRequest, NotFound, ServingError
from aim_kserve.http import ClientDisconnected, check_media, parse_object, read_body
from aim_kserve.identity.permission import check_use, may_use
from aim_runtime.engines.adapters import not_loaded
from aim_runtime.engines.base import TakesAdapters
from aim_runtime.model import RuntimeModel
from aim_runtime.models.directory import Models
from aim_runtime.models.entry import Launch

MAX_BODY_BYTES = 1 << 20
Body = TypeVar("Body", bound=BaseModel)


class Audit(Protocol):
    """Where admin actions are told (``aim_runtime.audit``)."""

    def __call__(self, action: str, *, model: str, outcome: str, **fields: Any) -> None: ...


class LoadAdapter(BaseModel):
    """vLLM's fields, and ``base_model_name`` where several models are served. Whoever asks must be
    permitted both names."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadAdapter(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    lora_name: str
    lora_int_id: int | None = None  # vLLM takes it and does nothing with it


class Migrate(BaseModel):
    """``card`` and ``partition``: where to; ``leaving``: the place of the replica that goes (``card 0 partition 1``),
    where there are several."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    card: Annotated[int, Field(ge=0)]
    partition: Annotated[int, Field(ge=0)] = 0
    leaving: str | None = None


def migration_routes(models: Models, launch_at: Callable[[str, int, int], Launch]) -> list[BaseRoute]:
    """``POST /v2/repository/models/NAME/migrate``, beside KServe's load and unload.

    Args:
        launch_at: (name, card, partition) → how the model is started there; called in a thread.
    """

    async def migrate(request: Request) -> Response:
        name, body = request.path_params["name"], await _read(Migrate, request)
        models.permit(name, "migrate")
        launch = await asyncio.to_thread(launch_at, name, body.card, body.partition)
        await models.migrate(name, launch, body.leaving)
        return JSONResponse({"name": name, "migrate": True, "place": launch.place})

    return [Route("/v2/repository/models/{name:path}/migrate", migrate, methods=["POST"])]


def adapter_routes(
    served: Callable[[], Sequence[RuntimeModel]], *, audit: Audit, directory: Path | None = None
) -> list[BaseRoute]:
    """The two routes.

    Args:
        served: the models that are served now.
        audit: told of every action, refused ones too.
        directory: adapters must lie below it; None: anywhere.
    """
    admin = _Adapters(served, audit, directory)
    return [
        Route("/v1/load_lora_adapter", admin.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", admin.unload, methods=["POST"]),
    ]


class _Adapters:
    def __init__(self, served: Callable[[], Sequence[RuntimeModel]], audit: Audit, directory: Path | None) -> None:
        self._served = served
        self._audit = audit
        self._directory = directory

    async def load(self, request: Request) -> Response:
        """An adapter for a model that is served."""
        body = await _read(LoadAdapter, request)
        fields = {"adapter": body.lora_name, "path": body.lora_path}
        await self._audited("load_adapter", body.base_model_name, fields, lambda: self._load(body))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """An adapter, by its name."""
        body = await _read(UnloadAdapter, request)
        owner = self._owner(body.lora_name)
        base = None if owner is None else str(owner.name)
        await self._audited("unload_adapter", base, {"adapter": body.lora_name}, lambda: self._unload(body.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _audited(
        self, action: str, base: str | None, fields: dict[str, Any], work: Callable[[], Awaitable[None]]
    ) -> None:
        names = [str(model.name) for model in self._served()]
        model = base or (names[0] if len(names) == 1 else "")
        began_s = time.monotonic()
        outcome, reason = "failed", None
        try:
            await work()
            outcome = "ok"
        except ServingError as error:
            outcome, reason = "refused" if error.status < 500 else "failed", error.message
            raise
        except asyncio.CancelledError:
            reason = "the client left before the end; it is carried out"
            raise
        finally:
            seconds = round(time.monotonic() - began_s, 3)
            self._audit(action, model=model, outcome=outcome, reason=reason, seconds=seconds, **fields)

    async def _load(self, body: LoadAdapter) -> None:
        model = self._base(body.base_model_name)
        check_use(body.lora_name, self._names())
        self._check_free(body, model)
        await _taking(model).load_adapter(body.lora_name, self._inside(body.lora_path))

    async def _unload(self, name: str) -> None:
        check_use(name, self._names())
        model = self._owner(name)
        if model is None:
            adapters = [name for model in self._served() for name in model.runs_on.adapters]
            raise not_loaded(name, list(filter(may_use, adapters)))
        check_use(str(model.name), self._names())
        await _taking(model).unload_adapter(name)
        model.metrics.remove_adapter(name)

    def _owner(self, adapter: str) -> RuntimeModel | None:
        """The model that it is loaded for."""
        return next((model for model in self._served() if adapter in model.runs_on.adapters), None)

    def _names(self) -> list[str]:
        return [name for model in self._served() for name in model.names]

    def _base(self, name: str | None) -> RuntimeModel:
        """The model that an adapter is loaded for.

        Raises:
            Forbidden: whoever asks may not use it.
            BadRequest: several are served, and none is named.
            NotFound: no such model.
            Unavailable: it is not ready.
        """
        served = self._served()
        names = ", ".join(filter(may_use, (str(model.name) for model in served))) or "none"
        if name is not None or len(served) == 1:
            check_use(name or str(served[0].name), self._names())
        else:
            raise BadRequest(f"base_model_name: missing; the models served are: {names}", param="base_model_name")
        model = served[0] if name is None else next((model for model in served if model.name == name), None)
        if model is None:
            raise NotFound(f"base_model_name: {name!r} is not served; served are: {names}", param="base_model_name")
        refusal = model.refusal()
        if refusal is not None:
            raise refusal
        return model

    def _check_free(self, body: LoadAdapter, base: RuntimeModel) -> None:
        owner = next((model for model in self._served() if body.lora_name in model.names), None)
        if owner is None or (body.load_inplace and owner is base and body.lora_name in base.runs_on.adapters):
            return
        how = "" if owner is not base else ", or set load_inplace to replace it"
        whose = f" (model {owner.name})" if may_use(str(owner.name)) else ""
        raise BadRequest(
            f"lora_name: {body.lora_name!r} is taken{whose}: choose another name, unload it first{how}",
            param="lora_name",
            code="adapter_name_taken",
        )

    def _inside(self, text: str) -> Path:
        path = Path(text)
        if "\0" in text or not path.is_absolute():
            raise BadRequest(f"lora_path: {text[:200]!r} is no absolute path", param="lora_path")
        if self._directory is not None and not path.resolve().is_relative_to(self._directory.resolve()):
            raise BadRequest(
                f"lora_path: {text[:200]!r} is not below {self._directory}, where this server's adapters lie",
                param="lora_path",
            )
        return path


def _taking(model: RuntimeModel) -> TakesAdapters:
    engine = model.runs_on
    if not isinstance(engine, TakesAdapters):
        raise BadRequest(f"model {model.name}: the {engine.name} engine takes no adapters at run time")
    return engine


async def _read(kind: type[Body], request: Request) -> Body:
    try:
        data = await read_body(request.receive, MAX_BODY_BYTES)
    except ClientDisconnected:
        raise BadRequest("the client left before its request was read") from None
    check_media(request.scope["headers"], data)
    try:
        return kind.model_validate(parse_object(data))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in problem["loc"])
        known = ", ".join(kind.model_fields)
        raise BadRequest(f"{param}: {problem['msg']} (fields: {known})", param=param) from None
