"""What ``/openapi.json`` says beside KServe's V1 and V2: our own routes, and the operations that the engines have now.

Bodies of OpenAI's operations are open: they travel as received, and what each field comes to is the engine's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.routing import BaseRoute, Route

from aim_runtime.models.directory import Models
from aim_runtime.openai_api import AT_THE_ROOT, ENDPOINTS, PREFIXES

Json = dict[str, Any]

_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_SCHEMAS: Json = {
    "OpenAIError": _ERROR,
    "OpenAIRequest": {
        "type": "object",
        "properties": {"model": {"type": "string", "description": "a served name; may be left out where there is one"}},
        "additionalProperties": True,
    },
}
_REFUSED = {
    "400": "malformed, too long, or not what the engine does",
    "401": "who asks?",
    "403": "not theirs",
    "404": "no such model",
    "429": "too many: Retry-After",
    "503": "not ready, full or shutting down: Retry-After",
}
_CONTENT: Json = {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}}}
_RESPONSES: Json = {f"OpenAI{status}": {"description": says, "content": _CONTENT} for status, says in _REFUSED.items()}


def described(document: Json, routes: Iterable[BaseRoute], models: Models) -> Json:
    """KServe's document with the app's other routes put in; where both have a path, ours answers and is told."""
    ours = {**dict(_routes(routes)), **dict(_operations(models))}
    told = {_shape(path) for path in ours}
    theirs = {path: item for path, item in document["paths"].items() if _shape(path) not in told}
    parts = document.get("components", {})
    return {
        **document,
        "info": {"title": "aim-runtime", "version": "1", "description": "OpenAI's API, KServe V1 and V2."},
        "paths": dict(sorted({**theirs, **ours}.items())),
        "components": {**parts, "schemas": {**parts.get("schemas", {}), **_SCHEMAS}, "responses": _RESPONSES},
    }


def _shape(path: str) -> str:
    """Of a path, whatever its parameters are called."""
    return re.sub(r"\{\w+\}", "{}", path)


def _routes(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, Json]]:
    for route in routes:
        if type(route) is Route and route.include_in_schema:  # FastAPI's own kind is in its document
            methods = sorted((route.methods or set()) - {"HEAD"})
            yield re.sub(r":path\}", "}", route.path), {method.lower(): _of_route(route) for method in methods}


def _of_route(route: Route) -> Json:
    told = re.sub(r"\s+", " ", (route.endpoint.__doc__ or route.name.replace("_", " ")).strip().partition("\n\n")[0])
    operation: Json = {"summary": told, "responses": {"200": {"description": "answered"}}}
    if names := re.findall(r"\{(\w+)", route.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return operation


def _operations(models: Models) -> Iterator[tuple[str, Json]]:
    for name in sorted(ENDPOINTS):
        if models.has_operation(name):
            paths = [f"{prefix}/{name}" for prefix in PREFIXES]
            yield from ((path, {"post": _operation(name)}) for path in [*paths, *({f"/{name}"} & {*AT_THE_ROOT})])


def _operation(name: str) -> Json:
    answers: Json = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    asked: Json = {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIRequest"}}}
    return {
        "summary": name,
        "requestBody": {"required": True, "content": asked},
        "responses": {
            "200": {"description": "answered; as events where `stream` asks for them", "content": answers},
            **{status: {"$ref": f"#/components/responses/OpenAI{status}"} for status in _REFUSED},
        },
    }
