"""``POST /filter`` and ``/filter/batch``: texts judged by the policy in force, for whoever has no predictor behind us.

    {"text": "mail bob@example.com", "direction": "prompt", "role": "user"}
    → {"action": "redact", "text": "mail <EMAIL_ADDRESS_1>", "findings": […], …}

A block is an answer like any other (200, ``action: block``, ``text: null``): it is the caller who acts on it. Values of
findings are never in an answer. ``GET /filter/openapi.json`` describes both.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.routing import Route
from starlette.types import Receive, Scope

from aim_guardrail.detectors.base import Passage
from aim_guardrail.in_force import Generation
from aim_guardrail.json_endpoint import JsonEndpoint
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.blocked import Blocked
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.pipeline.timed import Timed
from aim_guardrail.slots.slot import Slot, Slots, spelt
from aim_guardrail.transformer import GuardrailModel
from aim_kserve.access import log_of
from aim_kserve.errors import BadRequest, ServingError
from aim_kserve.http import (
    cancelled_on_disconnect,
    check_media,
    parse_object,
    read_body,
)

M = TypeVar("M", bound=BaseModel)

PATHS = ("/filter", "/v1/filter", "/filter/batch", "/v1/filter/batch", "/filter/openapi.json")
MOST_ITEMS = 256
_AT_ONCE = 8  # of a batch: so many are judged side by side


class Item(BaseModel):
    """One text to be judged.

    Attributes:
        prompt: what was asked, where the text is an answer: judges look at both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    text: str
    direction: Literal["prompt", "answer"] = "prompt"
    role: str = Field(default="user", max_length=64, pattern=r"^[A-Za-z_.-]*$")
    prompt: str | None = None


class Batch(BaseModel):
    """Texts, each judged for itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    items: tuple[Item, ...] = Field(min_length=1, max_length=MOST_ITEMS, strict=False)


class Found(BaseModel):
    """One finding: `start` and `end` count code points of the text that was sent, `end` exclusive."""

    family: str
    label: str
    action: str
    score: float
    start: int
    end: int
    rule: str
    found_by: str


class Judged(BaseModel):
    """What a text came to. `text`: as it may pass, null where it may not. `degraded`: rules that gave no answer."""

    action: Literal["allow", "flag", "redact", "block"]
    text: str | None
    families: list[str]
    findings: list[Found]
    degraded: list[str]
    policy: str
    version: str


async def judge(screening: Screening, item: Item) -> Judged:
    """Judge one text. Raises ServingError: it could not be."""
    if item.prompt is not None and item.direction == "answer":
        screening.prompt = [Passage(item.prompt, "prompt", "user")]
    role = item.role if item.direction == "prompt" else "assistant"
    shown: str | None = None
    with suppress(Blocked):
        (shown,) = await screening.screen_texts(item.direction, Slots([Slot(item.text, ("text",), "", role)]))
    findings = [
        Found(
            family=f.family,
            label=f.label,
            action=f.action,
            score=round(f.score, 4),
            start=f.start,
            end=f.end,
            rule=f.detector or f.family,
            found_by=f.rule_id,
        )
        for verdict in screening.verdicts[item.direction]
        for f in verdict.findings
    ]
    policy = screening.guard.policy
    action: Any = screening.actions[item.direction]
    return Judged(
        action=action,
        text=shown,
        families=sorted(screening.families),
        findings=findings,
        degraded=sorted(screening.degraded),
        policy=policy.name,
        version=policy.version_hash,
    )


def routes(model: GuardrailModel, metrics: Metrics, max_body_bytes: int) -> list[Route]:
    """What the server is given beside KServe's routes."""
    api = _Api(model, metrics, max_body_bytes)
    one, batch, document = map(JsonEndpoint, (api.one, api.batch, api.document))
    posted = [Route(path, one, methods=["POST"]) for path in PATHS[:2]]
    posted += [Route(path, batch, methods=["POST"]) for path in PATHS[2:4]]
    return [*posted, Route(PATHS[4], document, methods=["GET"])]


class _Api:
    def __init__(self, model: GuardrailModel, metrics: Metrics, max_body_bytes: int) -> None:
        self._model, self._metrics, self._max_body_bytes = model, metrics, max_body_bytes

    async def one(self, scope: Scope, receive: Receive) -> Any:
        context = _context(scope)
        with self._model.generation() as generation:
            item = _read(Item, await self._body(scope, receive))
            async with cancelled_on_disconnect(receive, scope):
                return (await self._one(item, context, generation)).model_dump()

    async def batch(self, scope: Scope, receive: Receive) -> Any:
        """A result for each text, in their order; one that could not be judged has an ``error`` instead."""
        turn, context = asyncio.Semaphore(_AT_ONCE), _context(scope)

        async def one(item: Item) -> dict[str, Any]:
            async with turn:
                try:
                    return (await self._one(item, context, generation)).model_dump()
                except ServingError as error:
                    return error.body()

        with self._model.generation() as generation:
            items = (await asyncio.to_thread(_read, Batch, await self._body(scope, receive))).items
            async with cancelled_on_disconnect(receive, scope):
                return {"results": list(await asyncio.gather(*map(one, items)))}

    async def document(self, scope: Scope, receive: Receive) -> Any:
        return document()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        body = await read_body(receive, self._max_body_bytes)
        check_media(scope["headers"], body)
        return body

    async def _one(self, item: Item, context: RequestContext, generation: Generation) -> Judged:
        async with self._model.screening(generation, context) as screening:
            screening.watch.direction = item.direction
            await screening.watch.hear(item.text.encode())
            return await self._judged(item, screening)

    async def _judged(self, item: Item, screening: Screening) -> Judged:
        if not screening.guard.watches(item.direction):
            name = screening.guard.policy.name
            raise BadRequest(f"direction: the policy {name!r} has no rules for the {item.direction}", param="direction")
        with Timed(screening, self._metrics, item.direction):
            return await judge(screening, item)


def _context(scope: Scope) -> RequestContext:
    return RequestContext.of(scope["path"], scope["headers"], log_of(scope).client)


def _read(model: type[M], body: bytes) -> M:
    """The request. Raises BadRequest, naming the field."""
    try:
        return model.model_validate(parse_object(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = spelt(first["loc"])
        remedy = f"known: {', '.join(Item.model_fields)}" if first["type"] == "extra_forbidden" else ""
        said = f"unknown field: {remedy}" if remedy else first["msg"]
        raise BadRequest(f"{where or 'the body'}: {said[0].lower()}{said[1:]}", param=where or None) from None


def document() -> dict[str, Any]:
    """The two routes in OpenAPI 3.1."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    for model in (Item, Batch, Judged):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    of_batch = {"anyOf": [_ref("Judged"), _ref("Error")]}
    results = {
        "type": "object",
        "required": ["results"],
        "properties": {"results": {"type": "array", "items": of_batch}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "aim-guardrail: filter", "version": "1"},
        "paths": {
            "/filter": {"post": _operation("Judge one text", "Item", _ref("Judged"))},
            "/filter/batch": {"post": _operation(f"Judge up to {MOST_ITEMS} texts", "Batch", results)},
        },
        "components": {"schemas": schemas},
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message"], "properties": {"message": {"type": "string"}}}},
}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _operation(what: str, takes: str, gives: dict[str, Any]) -> dict[str, Any]:
    def answer(said: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"description": said, "content": {"application/json": {"schema": schema}}}

    refused = {400: "malformed", 401: "who asks?", 403: "not theirs", 408: "too slow", 413: "too large", 415: "no JSON"}
    failed = {429: "too many", 503: "a detector failed, or not ready"}
    return {
        "summary": what,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(takes)}}},
        "responses": {
            "200": answer("judged", gives),
            **{str(status): answer(said, _ref("Error")) for status, said in {**refused, **failed}.items()},
        },
    }
