"""OpenAI's HTTP surface over the directory of models, under ``/v1`` and ``/openai/v1``.

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
from aim_kserve.shortcut import EXTENSION
from aim_runtime.engines.base import Json, RequestContext
from aim_runtime.fields import header_of
from aim_runtime.model import RuntimeModel
from aim_runtime.models.directory import Models
from aim_runtime.models.variants import VARIANT_HEADER, Split
from aim_runtime.probes import probe_routes

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


def model_routes(models: Models) -> list[BaseRoute]:
    """The model cards and the server's state, for the router."""
    cards, state = ModelCards(models), ServerState(models)
    return [
        Route("/health", state.health, methods=["GET"]),
        Route("/ping", state.health, methods=["GET", "POST"]),
        Route("/version", state.version, methods=["GET"]),
        Route("/load", state.load, methods=["GET"]),
        *probe_routes(models, lambda: {model.name: model.refusal() for model in models.served}, models.refusal_of),
        *(Route(f"{prefix}/models", cards.all, methods=["GET"]) for prefix in PREFIXES),
        *(Route(f"{prefix}/models/{{name:path}}", cards.one, methods=["GET"]) for prefix in PREFIXES),
    ]


class WrongMethod(BadRequest):
    status = 405

    def headers(self) -> dict[str, str]:
        return {"allow": "POST"}


class Operations:
    """ASGI middleware: ``POST <prefix>/<operation>`` for whatever operations the engines have once they are loaded.

    It stands before the router and FastAPI's own middlewares: every token of a stream and every wake-up of a waiting
    request would pass through each of them (a fifth of our CPU, ``bench/server.py``).
    """

    def __init__(self, app: ASGIApp, *, models: Models, max_body_bytes: int) -> None:
        self.app = app
        self.models = models
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = _operation(scope) if scope["type"] == "http" else None
        if operation is None or not (operation in ENDPOINTS or self.models.has_operation(operation)):
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
        context.shortcut.write = scope.get("extensions", {}).get(EXTENSION, {}).get("write")
        async with cancelled_on_disconnect(receive, scope):
            route = self.models.route(body, context)
            answer = await route.call(operation, body, context)
            if context.ignored or route.variant:
                send = _with_headers(send, context.ignored, route.variant)
            if isinstance(answer, dict):
                await send_json(send, answer)
            else:
                await pump_events(send, answer, shortcut=context.shortcut)


def _with_headers(send: Send, ignored: list[str], variant: str) -> Send:
    """``send`` with the headers that tell which fields of the body were ignored, and which variant answers."""
    told = {b"x-ignored-fields": header_of(ignored).encode(), VARIANT_HEADER.encode(): variant.encode()}
    headers = [(name, value) for name, value in told.items() if value]

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    return send_with_headers


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

    def __init__(self, models: Models) -> None:
        self._models = models

    async def health(self, _: Request) -> Response:
        """No body; the reason of a 503 is on the KServe routes."""
        return Response(status_code=200 if self._models.refusal() is None else 503)

    async def version(self, _: Request) -> Response:
        """Of the engine; of several models, of each one's."""
        by_model = {
            model.name: {"version": model.runs_on.version, "engine": model.runs_on.name}
            for model in self._models.served
            if self._models.permits(model.name)
        }
        first = next(iter(by_model.values()), {})
        return JSONResponse(first if len(by_model) < 2 else {**first, "models": by_model})

    async def load(self, _: Request) -> Response:
        """Requests in the engines, running and waiting."""
        stats = [model.runs_on.stats() for model in self._models.served]
        return JSONResponse({"server_load": sum(now.running + now.waiting for now in stats)})


class ModelCards:
    """``GET …/models`` and ``GET …/models/NAME``, which OpenAI and KServe's V1 protocol both own: both are answered
    in one body. A model that is not ready is listed (it is here) but its own card is a 503, KServe's readiness. Whoever
    asks sees what it may use."""

    def __init__(self, models: Models) -> None:
        self.models = models

    async def all(self, _: Request) -> Response:
        """The cards of all names that the caller may use."""
        served, may_see = self.models.served, self.models.permits
        cards = [_card(model, name) for model in served for name in model.names if may_see(name)]
        cards += [_split_card(split, name) for split in self.models.splits for name in _names(split) if may_see(name)]
        names = [model.name for model in served if may_see(model.name)]
        return JSONResponse({"object": "list", "data": cards, "models": names})

    async def one(self, request: Request) -> Response:
        """A name's card; 503 while it is not ready."""
        asked = request.path_params["name"]
        self.models.permit(asked)
        refusal = self.models.refusal_of(asked)
        if refusal is not None:
            raise refusal
        split = self.models.split(asked)
        card = _card(self.models.get(asked), asked) if split is None else _split_card(split, asked)
        return JSONResponse({**card, "name": asked, "ready": True})


def _names(split: Split) -> tuple[str, ...]:
    return (split.name, *split.entry.aliases)


def _split_card(split: Split, name: str) -> Json:
    created = min((model.created for model in split.models), default=0)
    card: Json = {"id": name, "object": "model", "created": created, "owned_by": "aim-runtime"}
    if name != split.name:
        card["root"] = split.name
    lengths = [model.runs_on.max_model_len for model in split.models if model.refusal() is None]
    return {**card, "variants": split.card()} | ({"max_model_len": min(lengths)} if lengths else {})


def _card(model: RuntimeModel, name: str) -> Json:
    card: Json = {"id": name, "object": "model", "created": model.created, "owned_by": "aim-runtime"}
    if name in model.aliases:
        card["root"] = model.name  # vLLM's field for the model that answers
    elif name != model.name:
        card["root"] = card["parent"] = model.name  # vLLM's fields for an adapter
    if model.refusal() is None:
        card["max_model_len"] = model.runs_on.max_model_len
    return card
