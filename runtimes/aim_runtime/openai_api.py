"""OpenAI's HTTP surface over :meth:`RuntimeModel.call`, under ``/v1`` and ``/openai/v1``.

KServe's own OpenAI routes need one exact version of vLLM; these need none. They are generic over the engine's
operations and know no field of a body but ``model`` and what the answer's form tells them: bodies travel as received.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from aim_kserve.access import log_of
from aim_kserve.errors import ServingError
from aim_kserve.http import (
    ClientDisconnected,
    cancelled_on_disconnect,
    parse_object,
    pump_events,
    read_body,
    send_error,
    send_json,
)
from aim_runtime.engines.base import Json, RequestContext
from aim_runtime.model import RuntimeModel, unknown_model

PREFIXES = ("/openai/v1", "/v1")
#: vLLM serves these beside ``/v1`` too.
AT_THE_ROOT = ("tokenize", "detokenize")
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


def openai_routes(model: RuntimeModel, *, max_body_bytes: int) -> list[BaseRoute]:
    """The routes, most used first."""
    cards = ModelCards(model)
    return [
        OperationRoute(model, max_body_bytes),
        *(Route(f"{prefix}/models", cards.all, methods=["GET"]) for prefix in PREFIXES),
        *(Route(f"{prefix}/models/{{name:path}}", cards.one, methods=["GET"]) for prefix in PREFIXES),
    ]


class OperationRoute(BaseRoute):
    """``POST <prefix>/<operation>`` for whatever operations the engine has once it is loaded."""

    def __init__(self, model: RuntimeModel, max_body_bytes: int) -> None:
        self.model = model
        self.max_body_bytes = max_body_bytes

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http":
            return Match.NONE, {}
        operation = _operation(scope["path"])
        if operation is None or not (operation in ENDPOINTS or operation in self.model.runs_on.operations):
            return Match.NONE, {}
        return Match.FULL if scope["method"] == "POST" else Match.PARTIAL, {"aim.operation": operation}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            raise HTTPException(405, headers={"allow": "POST"})
        try:
            body = parse_object(await read_body(receive, self.max_body_bytes))
            await self._answer(scope["aim.operation"], body, scope, receive, send)
        except ServingError as error:
            await send_error(send, error)
        except ClientDisconnected:
            log_of(scope).client_left = True

    async def _answer(self, operation: str, body: Json, scope: Scope, receive: Receive, send: Send) -> None:
        context = RequestContext(log_of(scope).unique_id, Headers(raw=scope["headers"]))
        async with cancelled_on_disconnect(receive):
            answer = await self.model.call(operation, body, context)
            if isinstance(answer, dict):
                await send_json(send, answer)
            else:
                await pump_events(send, answer)


def _operation(path: str) -> str | None:
    for prefix in PREFIXES:
        if path.startswith(prefix):
            return path[len(prefix) + 1 :]
    return path[1:] if path[1:] in AT_THE_ROOT else None


class ModelCards:
    """``GET …/models`` and ``GET …/models/NAME``, which OpenAI and KServe's V1 protocol both own: both are answered
    in one body. A model that is not ready is listed (it is here) but its own card is a 503, KServe's readiness."""

    def __init__(self, model: RuntimeModel) -> None:
        self.model = model

    async def all(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()], "models": [self.model.name]})

    async def one(self, request: Request) -> Response:
        asked = request.path_params["name"]
        if asked != self.model.name:
            raise unknown_model(asked, self.model.name)
        refusal = self.model.refusal()
        if refusal is not None:
            raise refusal
        return JSONResponse({**self._card(), "name": self.model.name, "ready": True})

    def _card(self) -> Json:
        card: Json = {
            "id": self.model.name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "aim-runtime",
        }
        if self.model.refusal() is None:
            card["max_model_len"] = self.model.runs_on.max_model_len
        return card
