"""vLLM's serving objects as operations: body in, vLLM's request class, vLLM's answer out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, TypeAdapter, model_validator
from starlette.datastructures import State
from starlette.responses import Response
from vllm.entrypoints.generate.generative_scoring.serving import GenerativeScoringRequest
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.pooling.classify.protocol import ClassificationRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
from vllm.entrypoints.pooling.pooling.protocol import PoolingRequest
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json, Operation, RequestContext, Stream, Usage
from aim_runtime.fields import Fields, fields_of

from .adapters import Adapters, Lease
from .build import Built
from .errors import REFUSALS, from_event, from_exception, from_response, raise_if_cancelled


class CompletionBody(CompletionRequest):  # type: ignore[misc]  # untyped where we check
    """With chat's name for the limit, which vLLM does not know here and would ignore."""

    max_completion_tokens: int | None = None

    @model_validator(mode="after")
    def _limit_by_either_name(self) -> Self:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self


#: Path below ``/v1`` → vLLM's request class, the attribute of vLLM's app state that serves it, and its method.
ROUTES: dict[str, tuple[Any, str, str]] = {
    "chat/completions": (ChatCompletionRequest, "openai_serving_chat", "create_chat_completion"),
    "chat/completions/batch": (BatchChatCompletionRequest, "openai_serving_chat_batch", "create_batch_chat_completion"),
    "completions": (CompletionBody, "openai_serving_completion", "create_completion"),
    "responses": (ResponsesRequest, "openai_serving_responses", "create_responses"),
    "embeddings": (EmbeddingRequest, "serving_embedding", "__call__"),
    "pooling": (PoolingRequest, "serving_pooling", "__call__"),
    "classify": (ClassificationRequest, "serving_classification", "__call__"),
    "score": (ScoreRequest, "serving_scores", "__call__"),
    "rerank": (RerankRequest, "serving_scores", "__call__"),
    "generative_scoring": (GenerativeScoringRequest, "serving_generative_scoring", "create_generative_scoring"),
    "tokenize": (TokenizeRequest, "serving_tokenization", "create_tokenize"),
    "detokenize": (DetokenizeRequest, "serving_tokenization", "create_detokenize"),
}

#: Operations that compute nothing, and so need no adapter.
TOKENS = frozenset({"tokenize", "detokenize"})

DONE = "data: [DONE]\n\n"
ERROR = 'data: {"error"'
#: What clients of vLLM's own server say with them is decided here: ``RequestContext.priority``.
PRIORITY, PRIORITY_HEADER = "priority", "x-vllm-priority"

NO_LEASE = Lease(None, None)

Handler = Callable[[Any, "RawRequest"], Awaitable[Any]]


class Attached(NamedTuple):
    """What the loaded model has, as in ``engines.base.Engine``."""

    operations: Mapping[str, Operation]
    requests: Mapping[str, Fields | None]
    adapters: Adapters


async def attach(built: Built, served: str, model_dir: Path) -> Attached:
    """Create vLLM's serving objects on the running loop.

    Raises:
        BadRequest: an adapter that vLLM has loaded by itself is not applied.
    """
    tasks = await built.llm.get_supported_tasks()
    await built.llm.reset_mm_cache()  # drops the dummy inputs of the memory profile, as vLLM's server does
    state = State()
    await init_app_state(built.llm, state, built.args, tasks)
    found = {path: (kind, getattr(state, holder, None), method) for path, (kind, holder, method) in ROUTES.items()}
    adapters = Adapters(built, state.openai_serving_models, served, model_dir)
    await adapters.check_loaded()
    operations: dict[str, Operation] = {
        path: Endpoint(TypeAdapter(kind), getattr(serving, method), built, None if path in TOKENS else adapters)
        for path, (kind, serving, method) in found.items()
        if serving is not None
    }
    requests = {path: _fields(kind) for path, (kind, _, _) in ROUTES.items() if path in operations}
    return Attached(operations, requests, adapters)


def _fields(kind: Any) -> Fields | None:
    """What a client may say of vLLM's request."""
    fields = fields_of(kind)
    return fields and {name: kinds for name, kinds in fields.items() if name != PRIORITY}


class Headers(dict[str, str]):
    """Request headers, found whatever their case."""

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


class RawRequest:
    """What vLLM's serving objects read of a Starlette request: headers, and a place to leave metadata."""

    __slots__ = ("headers", "state")

    def __init__(self, ctx: RequestContext) -> None:
        self.headers = Headers(ctx.passed_on())
        self.headers["x-request-id"] = ctx.request_id
        self.headers.pop(PRIORITY_HEADER, None)
        self.state = SimpleNamespace(request_metadata=None)

    @property
    def request_id(self) -> str | None:
        """vLLM's own name for the request, once it has one."""
        metadata = self.state.request_metadata
        return metadata.request_id if metadata is not None else None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One operation (see ``engines.base.Operation``). ``adapters`` None: it needs none."""

    body: TypeAdapter[Any]
    handler: Handler
    built: Built
    adapters: Adapters | None = None

    async def __call__(self, body: Json, ctx: RequestContext) -> Json | Stream:
        """Raises ServingError for everything that is wrong with the request, also if vLLM finds out only when the
        engine takes it in: a stream is handed out after its first chunk."""
        lease = await self.adapters.lease(body.get("model")) if self.adapters is not None else NO_LEASE
        streams = False
        try:
            answer = await self._answer(body, ctx, lease)
            streams = not isinstance(answer, dict)
            return answer
        finally:
            if not streams:
                lease.end()

    async def _answer(self, body: Json, ctx: RequestContext, lease: Lease) -> Json | Stream:
        raw = RawRequest(ctx)
        try:
            request = self.body.validate_python(body)
            self._prepare(request, raw, ctx)
            answer = await self._asked(request, raw)
        except REFUSALS as error:
            raise from_exception(error) from error
        if isinstance(answer, ErrorResponse):
            raise from_response(answer)
        if isinstance(answer, AsyncGenerator):
            stream = chunks(answer, raw, ctx.usage, self.built, lease)
            await anext(stream)
            return stream
        return whole(answer, raw, ctx.usage)

    async def _asked(self, request: Any, raw: RawRequest) -> Any:
        """vLLM's answer. If it is cancelled, nothing of the request is left in the engine when this raises."""
        try:
            answer = await self.handler(request, raw)
            if isinstance(answer, ErrorResponse):
                raise_if_cancelled()
            return answer
        except asyncio.CancelledError:
            await self.built.drop(raw.request_id)
            raise

    def _prepare(self, request: Any, raw: RawRequest, ctx: RequestContext) -> None:
        refuse_ignored(request)
        if (
            getattr(request, "continue_final_message", False)
            and "add_generation_prompt" not in request.model_fields_set
        ):
            request.add_generation_prompt = False  # vLLM's default would contradict it
        if isinstance(request, ResponsesRequest):
            request.request_id = f"resp_{ctx.request_id}"
        if hasattr(request, PRIORITY):
            request.priority = ctx.priority if self.built.schedules_by_priority else 0
        if getattr(request, "encoding_format", None) in ("bytes", "bytes_only"):
            raise BadRequest(
                f"encoding_format: {request.encoding_format!r} is not JSON; use 'float' or 'base64'",
                param="encoding_format",
            )


def refuse_ignored(request: Any) -> None:
    """What vLLM takes and ignores inside a field that is in use.

    Raises:
        BadRequest: names it.
    """
    options = getattr(request, "stream_options", None)
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        name = "stream_options.continuous_usage_stats"
        raise BadRequest(f"{name}: needs 'stream_options.include_usage': true", param=name)
    wanted = getattr(request, "response_format", None)
    extra = getattr(wanted, "model_extra", None) or {}
    if extra:
        name = f"response_format.{next(iter(extra))[:64]}"
        raise BadRequest(f"{name}: no field of response_format; a schema goes in json_schema.schema", param=name)


async def chunks(
    events: AsyncGenerator[Any, None], raw: RawRequest, usage: Usage, built: Built, lease: Lease = NO_LEASE
) -> Stream:
    """vLLM's events as the protocol's chunks.

    The first item is empty and taken before the stream is handed out: by then vLLM's first event is here (or its
    refusal), and from then on ``aclose`` runs the ``finally`` below, which aborts the request and ends ``lease``, and
    returns once nothing of it is left in the engine.
    """
    encode = named_event(usage)
    sequences: list[Any] = []
    over = False
    try:
        event = await anext(events, DONE)
        chunk = sse_payload(event) if isinstance(event, str) else encode(event)
        sequences = built.sequences_of(raw.state.request_metadata.request_id)
        over = event == DONE
        yield b""
        if over:
            return
        yield chunk
        async for event in events:
            over = event == DONE
            if over:
                break
            yield sse_payload(event) if isinstance(event, str) else encode(event)
    except REFUSALS as error:
        raise from_exception(error) from error
    finally:
        try:
            await events.aclose()
            if not over:
                await built.drop(raw.request_id)
        finally:
            lease.end()
        take_metadata(raw, usage)
        if not usage.prompt_tokens:
            take_sequences(sequences, usage)


def sse_payload(event: str) -> bytes:
    """The JSON of ``data: {...}\\n\\n``.

    Raises:
        ServingError: it is vLLM's error event.
    """
    if event.startswith(ERROR):
        raise from_event(event)
    return event[6:-2].encode()


def named_event(usage: Usage) -> Callable[[BaseModel], bytes]:
    """An encoder for the responses API, which keeps its usage in the last event."""

    def encode(event: Any) -> bytes:
        if event.type == "response.completed":
            take_response(event.response, usage)
        return f"event: {event.type}\ndata: {event.model_dump_json(by_alias=True)}".encode()

    return encode


def whole(answer: Any, raw: RawRequest, usage: Usage) -> Json:
    """A complete answer as a dict."""
    if isinstance(answer, Response):  # vLLM's pooling objects answer with HTTP responses
        body: Json = json.loads(bytes(answer.body))
        usage.prompt_tokens = (body.get("usage") or {}).get("prompt_tokens", 0)
        return body
    if isinstance(answer, ResponsesResponse):
        take_response(answer, usage)
        return dict(answer.model_dump(mode="json", by_alias=True))
    take_metadata(raw, usage)
    return dict(answer.model_dump(mode="json"))  # prompt_logprobs has token ids for keys, which JSON has not


def take_metadata(raw: RawRequest, usage: Usage) -> None:
    metadata = raw.state.request_metadata
    final = metadata.final_usage_info if metadata is not None else None
    if final is not None:
        details = final.prompt_tokens_details
        usage.prompt_tokens = final.prompt_tokens
        usage.completion_tokens = final.completion_tokens or 0
        usage.cached_tokens = (details.cached_tokens or 0) if details is not None else 0


def take_sequences(sequences: list[Any], usage: Usage) -> None:
    """Of a stream that was aborted: what had been generated by then."""
    usage.prompt_tokens = sum(state.prompt_len for state in sequences if state.request_index == 0)
    usage.completion_tokens = sum(state.detokenizer.num_output_tokens() for state in sequences)


def take_response(response: Any, usage: Usage) -> None:
    if response.usage is not None:
        usage.prompt_tokens = response.usage.input_tokens
        usage.completion_tokens = response.usage.output_tokens
        usage.cached_tokens = response.usage.input_tokens_details.cached_tokens
