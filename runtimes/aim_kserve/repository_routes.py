"""KServe V2's model repository extension over REST: KServe has its load and unload, not its index, and reads no body.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from aim_kserve.access import log_of
from aim_kserve.errors import BadRequest
from aim_kserve.http import ClientDisconnected, cancelled_on_disconnect, check_media, parse_object, read_body
from aim_kserve.kserve import ModelRepositoryExtension

MAX_BODY_BYTES = 64 * 1024
#: Triton's own clients send it with every unload; no model of ours depends on another.
_HARMLESS = frozenset({"unload_dependents"})


def repository_routes(repository: ModelRepositoryExtension) -> list[BaseRoute]:
    """Index, load and unload. What has begun goes on when its client leaves."""

    async def index(request: Request) -> Response:
        """What may be loaded, and its state; `ready: true`, those that are."""
        body = await _body(request, {"ready"})
        ready = body.get("ready", False)
        if not isinstance(ready, bool):
            raise BadRequest(f"ready: must be true or false (got {ready!r})", param="ready")
        return JSONResponse(await repository.index(ready))

    async def load(request: Request) -> Response:
        """Answers once the model is ready."""
        return await _changed(request, repository.load)

    async def unload(request: Request) -> Response:
        """Answers once the model is gone; requests in flight end first."""
        return await _changed(request, repository.unload)

    return [
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{name:path}/load", load, methods=["POST"]),
        Route("/v2/repository/models/{name:path}/unload", unload, methods=["POST"]),
    ]


async def _changed(request: Request, change: Callable[[str], Awaitable[Any]]) -> Response:
    """What ``change`` of the named model answers. It is cancelled when the client leaves: what waits need not begin."""
    try:
        _check_parameters(await _body(request, {"parameters"}))
        async with cancelled_on_disconnect(request.receive, request.scope):
            return JSONResponse(await change(request.path_params["name"]))
    except ClientDisconnected:
        log_of(request.scope).client_left = True
        return Response(status_code=499)  # nginx's word for it; nobody reads it
    raise AssertionError  # unreachable: mypy takes the context for one that may swallow exceptions


async def _body(request: Request, known: set[str]) -> dict[str, Any]:
    raw = await read_body(request.receive, MAX_BODY_BYTES)
    check_media(request.scope["headers"], raw)
    body = parse_object(raw) if raw.strip() else {}
    for name in body:
        if name not in known:
            raise BadRequest(f"{name}: unknown field; known: {', '.join(sorted(known))}", param=name)
    return body


def _check_parameters(body: dict[str, Any]) -> None:
    """A client that sends a configuration relies on it: ours is the process's own."""
    parameters = body.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequest("parameters: must be an object", param="parameters")
    for name in parameters:
        if name not in _HARMLESS:
            raise BadRequest(f"parameters.{name}: not taken here: leave it out", param=name)
