"""KServe's FastAPI app with our routes in front and KServe's error answers mended.

Two error shapes live side by side, because two kinds of clients do: ``{"error": "text"}`` on KServe's V1/V2
routes (what ``tritonclient`` and KServe's own client parse) and OpenAI's ``{"error": {...}}`` everywhere below
``/v1`` and ``/openai`` that is not V1 predict.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route, compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aim_kserve.access import log_of
from aim_kserve.errors import BadRequest, NotFound, ServingError, Unavailable, internal_error
from aim_kserve.http import (
    JSON_LENGTH,
    ClientDisconnected,
    cancelled_on_disconnect,
    check_media,
    check_values,
    header,
    json_length,
    read_body,
    speaks_openai,
)
from aim_kserve.kserve import (
    DataPlane,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ModelRepositoryExtension,
    ServerNotLive,
    ServerNotReady,
    UnsupportedProtocol,
    metrics_handler,
    register_v1_endpoints,
    register_v2_endpoints,
)
from aim_kserve.redacted import redacted
from aim_kserve.repository_routes import repository_routes
from aim_kserve.v2_body import check_v2

logger = logging.getLogger("aim.server")


def install(
    app: FastAPI,
    dataplane: DataPlane,
    repository: ModelRepositoryExtension,
    routes: Sequence[BaseRoute],
    *,
    max_body_bytes: int,
) -> FastAPI:
    """Put ``routes`` first, KServe's V1/V2 after them, ``/`` and ``/metrics``, and our exception handlers."""
    app.router.routes[:0] = [
        _Misspelt(),
        *routes,
        *repository_routes(repository),
        Route("/metrics", metrics_handler, methods=["GET"]),
        Route("/", _live(dataplane), methods=["GET"]),
    ]
    register_v1_endpoints(app, dataplane, repository)
    register_v2_endpoints(app, dataplane, repository)
    _let_names_have_slashes(app.router.routes)
    for route in app.router.routes:
        if isinstance(route, APIRoute) and "POST" in route.methods:
            route.app = _bounded(route.app, max_body_bytes)
    handled: tuple[type[Exception], ...] = (ServingError, *MAPPED, RequestValidationError, HTTPException, Exception)
    for kind in handled:
        app.add_exception_handler(kind, _answer)
    return app


def _let_names_have_slashes(routes: list[BaseRoute]) -> None:
    """A served name may be ``org/model``, as most are called; KServe's routes take one segment. The longest go first:
    ``/v2/models/a/ready`` asks for ``a``."""
    named = [route for route in routes if isinstance(route, APIRoute) and "{model_name}" in route.path]
    for route in named:
        path = route.path.replace("{model_name}", "{model_name:path}")
        route.path_regex, route.path_format, route.param_convertors = compile_path(path)
    others = [route for route in routes if route not in named]
    routes[:] = [*others, *sorted(named, key=lambda route: -route.path.count("/"))]


def _bounded(app: ASGIApp, max_body_bytes: int) -> ASGIApp:
    """KServe reads a body of any size and kind, and computes on when nobody is waiting any more."""

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive, max_body_bytes)
        check_media(scope["headers"], body)
        length = header(scope["headers"], JSON_LENGTH)
        text = body[: json_length(length, len(body))] if length else body
        if scope["path"].startswith("/v2/") and text:
            check_v2(text)
        else:
            check_values(text)
        scope["headers"] = _label_json(scope["headers"])
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:  # a streaming answer watches for its client to leave: below, that ends it
                await asyncio.Future()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async with cancelled_on_disconnect(receive, scope):
            await app(scope, replay, send)

    async def until_gone(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await bounded(scope, receive, send)
        except ClientDisconnected:
            log_of(scope).client_left = True

    return until_gone


#: An octet of a path that needs no percent sign (RFC 3986: unreserved), or that would part it.
_NEEDLESS = re.compile(rb"%(?:2[DdEeFf]|3[0-9Aa]|4[1-9A-Fa-f]|5[0-9AaFf]|6[1-9A-Fa-f]|7[0-9AaEe])")


class _Misspelt(BaseRoute):
    """``/v1%2Fmodels`` is another path than ``/v1/models``: gateways match what they see, and must not be passed by a
    spelling that only we understand."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        spelt = scope["type"] != "http" or not _NEEDLESS.search(scope.get("raw_path") or b"")
        return (Match.NONE if spelt else Match.FULL), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["raw_path"].decode("latin-1")
        raise NotFound(f"no such route: {scope['method']} {path}: write it without needless percent signs")


def _live(dataplane: DataPlane) -> Callable[[Request], Awaitable[Response]]:
    async def live(_: Request) -> Response:
        """What KServe answers at the root, and 503 where ``/v2/health/live`` says it: many probe this one."""
        said = await dataplane.live()
        return JSONResponse(said, status_code=200 if said["status"] == "alive" else 503)

    return live


async def _answer(request: Request, error: Exception) -> Response:
    refusal = as_serving_error(error)
    if refusal.status == 500:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    headers = refusal.headers()
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        refusal.message = redacted(f"no such route: {request.method} {request.url.path}")
        headers |= error.headers or {}
    body = refusal.body() if speaks_openai(request.url.path) else {"error": refusal.message}
    return JSONResponse(body, status_code=refusal.status, headers=headers)


class Tolerant:
    """ASGI middleware around KServe's app: after a 500 Starlette re-raises and uvicorn drops the kept-alive connection,
    so that the client's next request is reset. The error has been answered and logged: it ends here."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = False

        async def send_noted(message: Message) -> None:
            nonlocal answered
            answered = answered or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except Exception:  # process edge: handlers above have logged it and, if they could, answered
            if not answered:
                raise


def _label_json(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """KServe takes a body that is not labelled JSON for raw bytes; ``curl -d`` labels everything a form."""
    kinds = [value for key, value in headers if key == b"content-type"]
    binary = any(key == JSON_LENGTH for key, _ in headers)
    if not kinds and not binary:
        return [*headers, (b"content-type", b"application/json")]
    if binary:  # KServe's own transformer labels a binary body twice and JSON wins: octets are what it is
        kind = b"application/octet-stream"
    elif kinds[0].startswith(b"application/x-www-form-urlencoded"):
        kind = b"application/json"
    else:
        return headers
    return [*(item for item in headers if item[0] != b"content-type"), (b"content-type", kind)]


#: KServe's exceptions → ours.
MAPPED: dict[type[Exception], type[ServingError]] = {
    InvalidInput: BadRequest,
    InferenceError: ServingError,
    ModelNotFound: NotFound,
    ModelNotReady: Unavailable,
    ServerNotLive: Unavailable,
    ServerNotReady: Unavailable,
    UnsupportedProtocol: BadRequest,
}


def as_serving_error(error: Exception) -> ServingError:
    """Any exception as the refusal a client is given; an unknown one is a 500 without its text."""
    if isinstance(error, ServingError):
        return error
    for kind, ours in MAPPED.items():
        if isinstance(error, kind):
            return ours(str(error), code="model_not_found" if kind is ModelNotFound else None)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return BadRequest(f"{where}: {first['msg']} (got {str(first.get('input'))[:80]!r})", param=where)
    if isinstance(error, HTTPException):
        kind = BadRequest if 400 <= error.status_code < 500 else ServingError
        return kind(str(error.detail), status=error.status_code)
    if isinstance(error, NotImplementedError):
        return ServingError(str(error) or "not implemented", status=501)
    return internal_error()
