"""An engine that computes nothing: deterministic words at a settable pace, behind the real Engine protocol.

Tests and benchmarks of the server use it. A body may carry ``"fake": {...}``: ``token_s`` (seconds per token),
``fail_after`` (tokens, then an unforeseen exception), ``refuse_after`` (tokens, then a ServingError), ``die`` (the
engine is dead afterwards), ``parsed`` (the body is judged as the embedded engine judges it, and the answer's text is
the JSON of what arrived).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from aim_kserve.errors import BadRequest, Unavailable
from aim_runtime.engines.base import EngineStats, Json, ModelLoadError, Operation, RequestContext, Stream
from aim_runtime.engines.llama_cpp.request import ChatBody, CompletionBody, GenerationBody, TokenizeBody, parse
from aim_runtime.fields import Fields, fields_of

LIMITS = ("max_completion_tokens", "max_tokens")
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and")


def words(count: int) -> Iterator[str]:
    """What the engine answers in ``count`` tokens."""
    return (("" if index == 0 else " ") + WORDS[index % len(WORDS)] for index in range(count))


class FakeChatBody(ChatBody):
    fake: dict[str, Any] | None = None


class FakeCompletionBody(CompletionBody):
    fake: dict[str, Any] | None = None


@dataclass
class FakeEngine:
    """See :class:`aim_runtime.engines.base.Engine`."""

    served_model_name: str
    load_s: float = 0.0
    load_error: str | None = None
    close_s: float = 0.0
    token_s: float = 0.0
    slots: int = 64
    max_waiting: int = 256
    max_model_len: int = 1000
    most_tokens: int = 10**6
    name: str = "fake"
    version: str = "1.2.3"
    dead: bool = False
    adapters: tuple[str, ...] = ()
    also: tuple[str, ...] = ()  # operations that it says it has, too: each tokenizes
    aborted: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    _running: int = 0
    _waiting: int = 0

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.slots)
        self._operations: dict[str, Operation] = {}

    @property
    def requests(self) -> Mapping[str, Fields | None]:
        """The embedded engine's, so that parameters have one list; only a few of them are looked at."""
        return {
            "chat/completions": fields_of(FakeChatBody),
            "completions": fields_of(FakeCompletionBody),
            "tokenize": fields_of(TokenizeBody),
        }

    @property
    def operations(self) -> Mapping[str, Operation]:
        return self._operations

    async def load(self) -> None:
        await asyncio.sleep(self.load_s)
        if self.load_error:
            raise ModelLoadError(self.load_error)
        self._operations = {
            **dict.fromkeys(self.also, self._tokenize),
            "chat/completions": self._chat,
            "completions": self._complete,
            "tokenize": self._tokenize,
            "fake/state": self._state,
            "fake/echo": self._echo,
        }

    def healthy(self) -> bool:
        return bool(self._operations) and not self.dead

    def stats(self) -> EngineStats:
        return EngineStats(self._running, self._waiting, self.slots, 0.25 if self._running else 0.0)

    async def drain(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while (self._running or self._waiting) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self._operations = {}
        await asyncio.to_thread(time.sleep, self.close_s)

    async def _tokenize(self, body: Json, _: RequestContext) -> Json:
        tokens = str(body.get("prompt", "")).split()
        return {"count": len(tokens), "tokens": list(range(len(tokens))), "max_model_len": self.max_model_len}

    async def _state(self, _: Json, __: RequestContext) -> Json:
        return {"aborted": self.aborted, "seen": self.seen, "running": self._running, "waiting": self._waiting}

    async def _echo(self, body: Json, context: RequestContext) -> Json:
        return {"body": body, "request_id": context.request_id, "headers": dict(context.headers)}

    async def _chat(self, body: Json, context: RequestContext) -> Json | Stream:
        if (body.get("fake") or {}).get("parsed"):
            return await self._answer(_Chat(self, body, context, ""))
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages: must be a non-empty list", param="messages")
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
                raise BadRequest(f"messages[{index}].role: unknown role in {message!r}", param="messages")
        return await self._answer(_Chat(self, body, context, " ".join(str(item.get("content")) for item in messages)))

    async def _complete(self, body: Json, context: RequestContext) -> Json | Stream:
        if (body.get("fake") or {}).get("parsed"):
            return await self._answer(_Completion(self, body, context, ""))
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise BadRequest("prompt: must be a string", param="prompt")
        return await self._answer(_Completion(self, body, context, prompt))

    async def _answer(self, request: _Request) -> Json | Stream:
        if (request.body.get("fake") or {}).get("parsed"):
            return request.parsed(parse(request.model, request.body))
        request.check()
        if self._running + self._waiting >= self.slots + self.max_waiting:
            raise Unavailable(f"{self._waiting} requests are waiting already", code="engine_full")
        self.seen.append(request.context.request_id)
        if request.body.get("stream"):
            return self._stream(request)
        tokens = [token async for token in self._tokens(request)]
        return request.whole(tokens)

    async def _stream(self, request: _Request) -> Stream:
        first = True
        async for token in self._tokens(request):
            if first and request.opening is not None:
                yield request.opening
            first = False
            yield request.chunk(token)
        yield request.last()
        if (request.body.get("stream_options") or {}).get("include_usage"):
            yield request.usage_chunk()

    async def _tokens(self, request: _Request):
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        token_s = (request.body.get("fake") or {}).get("token_s", self.token_s)
        done = False
        try:
            for index, token in enumerate(words(request.max_tokens)):
                request.misbehave(index)
                await asyncio.sleep(token_s)
                request.context.usage.completion_tokens += 1
                yield token
            done = True
        finally:
            self._running -= 1
            self._free.release()
            if not done:
                self.aborted.append(request.context.request_id)


class _Request:
    kind = ""
    model: type[GenerationBody]
    prefix = ""
    opening: bytes | None = None

    def __init__(self, engine: FakeEngine, body: Json, context: RequestContext, prompt: str) -> None:
        self.engine, self.body, self.context, self.prompt = engine, body, context, prompt
        self.limit = next((name for name in LIMITS if body.get(name) is not None), None)
        self.max_tokens = body[self.limit] if self.limit else 16
        self.id = f"{self.prefix}-{context.request_id}"
        context.usage.prompt_tokens = len(prompt.split())
        self._head = orjson.dumps(self._frame([]))[:-3]

    def check(self) -> None:
        if not isinstance(self.max_tokens, int) or not 1 <= self.max_tokens <= self.engine.most_tokens:
            raise BadRequest(f"{self.limit}: must be an integer >= 1 (got {self.max_tokens!r})", param=self.limit)
        temperature = self.body.get("temperature", 1)
        if not isinstance(temperature, (int, float)) or temperature < 0:
            raise BadRequest(f"temperature: must be a number >= 0 (got {temperature!r})", param="temperature")
        length = self.context.usage.prompt_tokens
        if length > self.engine.max_model_len:
            raise BadRequest(
                f"the prompt has {length} tokens, {length - self.engine.max_model_len} more than "
                f"max_model_len {self.engine.max_model_len}: shorten it",
                param="prompt",
                code="context_length_exceeded",
            )

    def misbehave(self, index: int) -> None:
        orders = self.body.get("fake") or {}
        if orders.get("die"):
            self.engine.dead = True
            raise Unavailable("the engine has died", code="engine_dead")
        if orders.get("fail_after") == index:
            raise ZeroDivisionError("unforeseen")
        if orders.get("refuse_after") == index:
            raise Unavailable("the engine gave up", code="engine_gave_up")

    def _frame(self, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": self.kind,
            "created": 1700000000,
            "model": self.engine.served_model_name,
            "choices": choices,
        }

    def usage(self) -> Json:
        usage = self.context.usage
        total = usage.prompt_tokens + usage.completion_tokens
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": total,
        }

    def usage_chunk(self) -> bytes:
        return orjson.dumps({**self._frame([]), "usage": self.usage()})

    def _choice_chunk(self, choice: Json) -> bytes:
        return self._head + b"[" + orjson.dumps(choice) + b"]}"

    def parsed(self, request: GenerationBody) -> Json:
        """The answer whose text says what the request model holds."""
        self.body = {}
        return self.whole([request.model_dump_json(exclude_unset=True, by_alias=True)])

    def whole(self, tokens: list[str]) -> Json:
        raise NotImplementedError

    def chunk(self, token: str) -> bytes:
        raise NotImplementedError

    def last(self) -> bytes:
        raise NotImplementedError

    @property
    def finish_reason(self) -> str:
        return "length" if self.limit else "stop"


class _Chat(_Request):
    model = FakeChatBody
    prefix = "chatcmpl"

    def __init__(self, engine: FakeEngine, body: Json, context: RequestContext, prompt: str) -> None:
        self.kind = "chat.completion.chunk" if body.get("stream") else "chat.completion"
        super().__init__(engine, body, context, prompt)
        delta = {"role": "assistant", "content": ""}
        self.opening = self._choice_chunk({"index": 0, "delta": delta, "finish_reason": None})

    def whole(self, tokens: list[str]) -> Json:
        message = {"role": "assistant", "content": "".join(tokens)}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
        return {**self._frame([choice]), "usage": self.usage()}

    def chunk(self, token: str) -> bytes:
        return self._choice_chunk({"index": 0, "delta": {"content": token}, "finish_reason": None})

    def last(self) -> bytes:
        return self._choice_chunk({"index": 0, "delta": {}, "finish_reason": self.finish_reason})


class _Completion(_Request):
    kind = "text_completion"
    model = FakeCompletionBody
    prefix = "cmpl"

    def whole(self, tokens: list[str]) -> Json:
        choice = {"index": 0, "text": "".join(tokens), "finish_reason": self.finish_reason, "logprobs": None}
        return {**self._frame([choice]), "usage": self.usage()}

    def chunk(self, token: str) -> bytes:
        return self._choice_chunk({"index": 0, "text": token, "finish_reason": None, "logprobs": None})

    def last(self) -> bytes:
        return self._choice_chunk({"index": 0, "text": "", "finish_reason": self.finish_reason, "logprobs": None})
