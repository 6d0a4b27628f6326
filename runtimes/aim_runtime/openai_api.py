"""OpenAI's HTTP surface over :meth:`RuntimeModel.call`, under ``/v1`` and ``/openai/v1``.

KServe's own OpenAI routes need one exact version of vLLM; these need none. They are generic over the engine's
operations and know no field of a body but ``model`` and what the answer's form tells them: bodies travel as received.
"""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aim_kserve.access import log_of
from aim_kserve.errors import BadRequest, ServingError
from aim_kserve.http import (
    ClientDisconnected,
    cancelled_on_disconnect,
    check_media,
    parse_object,
    pump_events,
    read_body,
    send_error,
    send_json,
)
from aim_kserve.rest import as_serving_error
from aim_runtime.engines.base import Json, RequestContext
from aim_runtime.fields import header_of
from aim_runtime.model import RuntimeModel, unknown_model

logger = logging.getLogger("aim.server")

PREFIXES = ("/openai/v1", "/v1")
#: vLLM serves these beside ``/v1`` too.
AT_THE_ROOT = ("/tokenize", "/detokenize")
#: POST routes of OpenAI's API and of vLLM's: where the engine lacks one, the client is told so, not "no such route".
ENDPOINTS = frozenset(
    {
        "audio/speech",
        "audio/transcriptions",
        "audio/translations",
        "chat/completions",
        "classify",
        "completions",
        "detokenize",
        "embeddings",
        "images/generations",
        "moderations",
        "pooling",
        "rerank",
        "responses",
        "score",
        "tokenize",
    }
)


def model_routes(model: RuntimeModel) -> list[BaseRoute]:
    """The model cards and the server's state, for the router."""
    cards, state = ModelCards(model), ServerState(model)
    return [
        Route("/health", state.health, methods=["GET"]),
        Route("/ping", state.health, methods=["GET", "POST"]),
        Route("/version", state.version, methods=["GET"]),
        Route("/load", state.load, methods=["GET"]),
        *(Route(f"{prefix}/models", cards.all, methods=["GET"]) for prefix in PREFIXES),
        *(Route(f"{prefix}/models/{{name:path}}", cards.one, methods=["GET"]) for prefix in PREFIXES),
    ]


class WrongMethod(BadRequest):
    status = 405

    def headers(self) -> dict[str, str]:
        return {"allow": "POST"}


class Operations:
    """ASGI middleware: ``POST <prefix>/<operation>`` for whatever operations the engine has once it is loaded.

    It stands before the router and FastAPI's own middlewares: every token of a stream and every wake-up of a waiting
    request would pass through each of them (a fifth of our CPU, ``bench/server.py``).
    """

    def __init__(self, app: ASGIApp, *, model: RuntimeModel, max_body_bytes: int) -> None:
        self.app = app
        self.model = model
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = _operation(scope) if scope["type"] == "http" else None
        if operation is None or not (operation in ENDPOINTS or operation in self.model.runs_on.operations):
            await self.app(scope, receive, send)
            return
        try:
            if scope["method"] != "POST":
                raise WrongMethod(f"{scope['path']} takes POST, not {scope['method']}")
            body = await read_body(receive, self.max_body_bytes)
            check_media(scope["headers"], body)
            await self._answer(operation, parse_object(body), scope, receive, send)
        except ServingError as error:
            await send_error(send, error)
        except ClientDisconnected:
            log_of(scope).client_left = True
        except Exception as error:  # process edge: uvicorn would drop the connection without a word
            logger.exception("%s failed", operation)
            await send_error(send, as_serving_error(error))

    async def _answer(self, operation: str, body: Json, scope: Scope, receive: Receive, send: Send) -> None:
        context = RequestContext(log_of(scope).unique_id, Headers(raw=scope["headers"]))
        async with cancelled_on_disconnect(receive):
            answer = await self.model.call(operation, body, context)
            send = _with_ignored(send, context.ignored) if context.ignored else send
            if isinstance(answer, dict):
                await send_json(send, answer)
            else:
                await pump_events(send, answer)


def _with_ignored(send: Send, names: list[str]) -> Send:
    """``send`` with the header that tells which fields of the body were ignored."""
    header = (b"x-ignored-fields", header_of(names).encode())

    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], header]
        await send(message)

    return send_with_header


def _operation(scope: Scope) -> str | None:
    """What follows the prefix. A path that is spelled otherwise (``/v1%2Fcompletions``) is another path: gateways
    match what they see, and must not be passed by a spelling that only we understand."""
    path: str = scope["path"]
    if b"%" in scope["raw_path"]:
        return None
    for prefix in PREFIXES:
        if path.startswith(f"{prefix}/"):
            return path[len(prefix) + 1 :]
    return path[1:] if path in AT_THE_ROOT else None


class ServerState:
    """What vLLM's server says of itself, and SageMaker's ``/ping``, in their forms: probes, routers and dashboards
    made for it ask here."""

    def __init__(self, model: RuntimeModel) -> None:
        self._model = model

    async def health(self, _: Request) -> Response:
        """No body; the reason of a 503 is on the KServe routes."""
        return Response(status_code=200 if self._model.refusal() is None else 503)

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": self._model.runs_on.version, "engine": self._model.runs_on.name})

    async def load(self, _: Request) -> Response:
        """Requests in the engine, running and waiting."""
        stats = self._model.runs_on.stats()
        return JSONResponse({"server_load": stats.running + stats.waiting})


class ModelCards:
    """``GET …/models`` and ``GET …/models/NAME``, which OpenAI and KServe's V1 protocol both own: both are answered
    in one body. A model that is not ready is listed (it is here) but its own card is a 503, KServe's readiness."""

    def __init__(self, model: RuntimeModel) -> None:
        self.model = model

    async def all(self, _: Request) -> Response:
        names = self.model.names
        return JSONResponse(
            {"object": "list", "data": [self._card(name) for name in names], "models": [self.model.name]}
        )

    async def one(self, request: Request) -> Response:
        asked = request.path_params["name"]
        if asked not in self.model.names:
            raise unknown_model(asked, self.model.names)
        refusal = self.model.refusal()
        if refusal is not None:
            raise refusal
        return JSONResponse({**self._card(asked), "name": asked, "ready": True})

    def _card(self, name: str) -> Json:
        card: Json = {"id": name, "object": "model", "created": self.model.created, "owned_by": "aim-runtime"}
        if name != self.model.name:
            card["parent"] = self.model.name  # vLLM's field for an adapter
        if self.model.refusal() is None:
            card["max_model_len"] = self.model.runs_on.max_model_len
        return card
