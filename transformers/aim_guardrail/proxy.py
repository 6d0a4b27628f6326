"""Everything but KServe's own routes: checked on its way to the predictor and back, else untouched.

``POST /v1/chat/completions`` and its kind are hot: plain ASGI in front of KServe's FastAPI app.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from aim_guardrail.asked import check_asked, is_restricted, names_model
from aim_guardrail.exact_json import exact
from aim_guardrail.feedback_api import PATH
from aim_guardrail.filter_api import PATHS
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Inline, Screening, by_size
from aim_guardrail.pipeline.timed import Timed
from aim_guardrail.protocols.head import check_query
from aim_guardrail.protocols.places import V2
from aim_guardrail.protocols.routes import endpoint, error_body, place_of
from aim_guardrail.protocols.v2 import check_binary
from aim_guardrail.slots.places import FREE
from aim_guardrail.slots.slot import Json
from aim_guardrail.speculation import Early, may_start, put
from aim_guardrail.traffic.gate import Traffic
from aim_guardrail.traffic.visit import Visit
from aim_guardrail.transformer import GuardrailModel
from aim_guardrail.upstream import Answer, sent_on
from aim_guardrail.way_back import WayBack
from aim_kserve.access import RequestLog, log_of
from aim_kserve.errors import NotFound, ServingError, internal_error
from aim_kserve.http import (
    JSON_LENGTH,
    ClientDisconnected,
    cancelled_on_disconnect,
    check_media,
    header,
    or_shutdown,
    parse_object,
    read_body,
    send_json,
)
from aim_kserve.identity.routes import lenient

logger = logging.getLogger("aim.server")

T = TypeVar("T")


class Proxy:
    """ASGI middleware around KServe's app, or (``app`` None) alone: then every path is the predictor's."""

    def __init__(
        self,
        app: ASGIApp | None,
        model: GuardrailModel,
        metrics: Metrics,
        max_body_bytes: int,
        traffic: Traffic | None = None,
    ) -> None:
        self.app = app
        self._traffic = traffic or Traffic(metrics)
        self._model = model
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None and (scope["type"] != "http" or self._is_kserves(scope["path"])):
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(self._model, self._metrics, scope, send)
        try:
            with self._model.generation() as generation:
                async with self._model.screening(generation, exchange.context) as screening:
                    with Visit(self._traffic, screening, log_of(scope)) as visit:
                        await visit.arrive()
                        body = await read_body(receive, self._max_body_bytes)
                        screening.complete()
                        async with cancelled_on_disconnect(receive, scope):
                            await exchange.serve(body, screening, visit)
        except ClientDisconnected:
            log_of(scope).client_left = True
        except ServingError as error:  # still loading, over a limit, the body too large, the server ends
            if exchange.begun:
                raise
            await exchange.refuse(error)

    def _is_kserves(self, path: str) -> bool:
        """Whether KServe's app answers this: probes, metrics, and what V2 says about this very process; all of V2
        where the predictor cannot be asked by HTTP."""
        if path.startswith("/v2/models/"):
            return path.endswith("/ready") or self._model.predictor.only_grpc
        return path in _OURS or path.startswith(("/v2/health/", "/v2/repository/"))


#: In an ASGI scope: who is asked in the predictor's place (`upstream.Upstream.send`).
UPSTREAM = "aim.upstream"

_OURS = frozenset(["/", "/metrics", "/v2", "/v2/models", "/docs", "/openapi.json", PATH, *PATHS])


#: What changes what everybody is served is no business of a guarded client's.
_OF_ADMINISTRATORS = frozenset(["load_lora_adapter", "unload_lora_adapter"])


class _Exchange:
    """One request and its answer.

    Attributes:
        context: what is known before the body is read.
    """

    __slots__ = (
        "_back",
        "_early",
        "_endpoint",
        "_log",
        "_metrics",
        "_model",
        "_own",
        "_place",
        "_query",
        "_scope",
        "_screening",
        "_send",
        "_visit",
        "context",
    )

    def __init__(self, model: GuardrailModel, metrics: Metrics, scope: Scope, send: Send) -> None:
        self._model, self._metrics, self._scope, self._send = model, metrics, scope, send
        self._log: RequestLog = log_of(scope)
        self._endpoint = endpoint(scope["path"])
        self._place = place_of(self._endpoint)
        self._query: bytes = scope["query_string"]
        self._early: Early | None = None
        self._back: WayBack | None = None
        self.context = RequestContext.of(scope["path"], scope["headers"], self._log.client)

    @property
    def begun(self) -> bool:
        """Whether any of the answer has been sent."""
        return self._back is not None and self._back.begun

    async def serve(self, body: bytes, screening: Screening, visit: Visit) -> None:
        self._screening, self._visit = screening, visit
        log = self._log
        self._own = {"traceparent": log.traceparent, "x-request-id": log.request_id, "accept-encoding": "identity"}
        path = self._scope["path"]
        # What is spelt as a protocol's own route is none of them.
        if self._place in (FREE, V2) and endpoint(lenient(path)) in _OF_ADMINISTRATORS:
            screening.error = NotFound(
                f"{path} changes the predictor: it is not served here, ask the predictor itself", code="not_served"
            )
            await self.refuse(screening.error)
            return
        try:
            with or_shutdown():
                await self._pass(body)
        except ServingError as error:
            if self.begun:
                raise
            self._screening.error = error
            self._visit.failed()
            if self._early is not None:
                await self._early.drop()
            told = self._screening.headers() if self._screening.action != "allow" else self._screening.policy_header()
            await self.refuse(error, told)
        except Exception as error:  # process edge: uvicorn would answer in plain text and drop the connection
            logger.exception("%s %s failed", self._scope["method"], self._scope["path"])
            if self.begun:
                raise
            self._screening.error = error
            await self.refuse(internal_error())
        finally:
            if self._early is not None:
                await self._early.drop()

    async def refuse(self, error: ServingError, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        body = error_body(self._scope["path"], error)
        await send_json(self._send, body, status=error.status, headers={**headers, **error.headers()})

    async def _pass(self, body: bytes) -> None:
        await self._screening.watch.hear(body)
        await self._visit.weigh(body, self._endpoint)
        if (body or self._query) and self._screening.guard.watches("prompt"):
            with Timed(self._screening, self._metrics, "prompt"):
                if self._query:
                    self._query = await check_query(self._screening, self._query)
                if body:
                    body = await self._checked_prompt(body)
        if self._decides_models and not self._lists_models:
            body = await self._run(self._permitted, body)
        await self._screening.turn()
        async with await self._asked(body) as answer:
            answer.heard = self._screening.watch.heard
            self._log.fields["upstream_status"] = answer.status
            self._visit.answered(answer)
            self._back = WayBack(
                self._scope, self._send, self._screening, self._visit, self._metrics, self._place, self._lists_models
            )
            await self._back.bring(answer)

    async def _asked(self, body: bytes) -> Answer:
        """The predictor's answer to what may pass."""
        if self._early is not None:
            if (answer := await self._early.answer(body)) is not None:
                return answer
            self._own["x-request-id"] += "-2"  # the first may not have ended there yet
        return await self._send_on(body)

    async def _send_on(self, body: bytes) -> Answer:
        scope, query = self._scope, self._query
        target = (scope["raw_path"] + b"?" + query if query else scope["raw_path"]).decode("latin-1")
        http = scope.get(UPSTREAM) or self._model.predictor.http
        self._visit.sent()
        return await http.send(scope["method"], target, sent_on(scope["headers"], self._own), body)

    async def _checked_prompt(self, body: bytes) -> bytes:
        headers = self._scope["headers"]
        check_media(headers, body)
        json_length = header(headers, JSON_LENGTH)
        if json_length:
            body, length = await check_binary(self._screening, "prompt", body, json_length)
            self._own[JSON_LENGTH.decode()] = str(length)
            return body
        return await self._check_prompt(body)

    async def _run(self, check: Callable[[bytes], T], body: bytes) -> T:
        return await by_size(len(body), check, body)

    async def _check_prompt(self, body: bytes) -> bytes:
        parsed = await self._run(parse_exact, body)
        early = self._start(body) if self._speculates(parsed) else None
        changed = await self._screening.screen("prompt", parsed, self._place, len(body), early)
        return self._written(body, parsed, changed)

    def _written(self, body: bytes, parsed: Json, changed: bool) -> bytes:
        return orjson.dumps(parsed) if changed or self._screening.has_repeated_keys(body) else body

    def _speculates(self, parsed: Json) -> bool:
        if not self._screening.guard.policy.speculative or UPSTREAM in self._scope:
            return False
        return may_start(self._endpoint, parsed)

    def _start(self, body: bytes) -> Inline:
        """Sends the request as the inline stage lets it pass, when that is known."""

        def draft(texts: list[str]) -> bytes:
            parsed = parse_exact(body)
            drafted = self._written(body, parsed, put(texts, parsed, self._place))
            return self._permitted(drafted) if self._decides_models else drafted

        async def start(texts: list[str]) -> None:
            drafted = await by_size(len(body), draft, texts)
            self._early = Early(self._send_on, self._metrics.speculated)
            self._early.start(drafted)

        return start

    def _permitted(self, body: bytes) -> bytes:
        """``body`` as the predictor gets it, in which whoever asks may use the model that is meant."""
        checked = self._screening.guard.watches("prompt")
        is_binary = header(self._scope["headers"], JSON_LENGTH) and names_model(self._scope["path"])
        if body and not checked and not is_binary:
            body = orjson.dumps(exact(parse_object(body), body))  # of two "model" the predictor sees the one we do
        check_asked(self._scope["path"], body, self._model.name)
        return body

    @property
    def _decides_models(self) -> bool:
        """Whether it is ours to say which models whoever asks may use."""
        return is_restricted() and not self._model.predictor.knows_callers

    @property
    def _lists_models(self) -> bool:
        """Whether the answer's models are to be those that whoever asks may use."""
        return self._endpoint == "models" and self._decides_models


def parse_exact(body: bytes) -> Json:
    """A request's JSON object, its integers in all their digits. Raises BadRequest."""
    parsed: Json = exact(parse_object(body), body)
    return parsed
