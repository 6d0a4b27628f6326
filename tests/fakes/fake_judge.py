"""A server that judges as it is told: what an OpenAI server answers, or what one should not, at the HTTP seam.

``with FakeJudge() as judge``: `judge.says` is what it answers next and from then on, in one of these forms: a JSON
object; bytes, sent as they are; a status, with an OpenAI error; HANG: silence; DROP: the connection is closed; or a
function of the request's JSON that gives one of them.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import orjson
from aiohttp import web

from listening import answering
from ports import free_ports

Json = dict[str, Any]
HANG, DROP = object(), object()


class FakeJudge:
    """``asked``: each request's JSON, with its path as `path` and its headers (names in lower case) as `headers`;
    ``open``: those not yet answered or given up; ``connections``: from where. ``heads``: sent with every answer.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        (self.port,) = free_ports(1)
        self.url = f"https://localhost:{self.port}/v1" if tls else f"http://127.0.0.1:{self.port}/v1"
        self.says: Any = {}
        self.heads: dict[str, str] = {}
        self.asked: list[Json] = []
        self.connections: set[str] = set()
        self.open = 0
        self._tls = tls
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        async with answering(self._answer, self.port, self._tls):
            self._started.set()
            await self._stop.wait()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        asked: Json = orjson.loads(body) if body else {}
        self.asked.append(
            {**asked, "path": request.path, "headers": {k.lower(): v for k, v in request.headers.items()}}
        )
        assert request.transport is not None
        self.connections.add(str(request.transport.get_extra_info("peername")))
        self.open += 1
        try:
            says = self.says(asked) if isinstance(self.says, Callable) else self.says  # type: ignore[arg-type]
            if says is HANG:
                await asyncio.sleep(3600)
            if says is DROP:
                request.transport.abort()
                return web.Response()  # which nobody gets
            status, data = (says, _error(says)) if isinstance(says, int) else (200, says)
            data = data if isinstance(data, bytes) else orjson.dumps(data)
            return web.Response(status=status, body=data, headers={"content-type": "application/json", **self.heads})
        finally:
            self.open -= 1


def _error(status: int) -> Json:
    return {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": str(status)}}


def completion(*tokens: tuple[str, float, dict[str, float]], finish_reason: str = "stop") -> Json:
    """vLLM's answer on `/completions`. Of each token: its text, its logprob, the likeliest in its place."""
    choice: Json = {
        "index": 0,
        "text": "".join(text for text, _, _ in tokens),
        "logprobs": {
            "text_offset": [sum(len(text) for text, _, _ in tokens[:at]) for at in range(len(tokens))],
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "tokens": [text for text, _, _ in tokens],
            "top_logprobs": [top for _, _, top in tokens],
        },
        "finish_reason": finish_reason,
        "stop_reason": None,
        "prompt_logprobs": None,
    }
    return {"id": "cmpl-1", "object": "text_completion", "created": 1700000000, "model": "guard", "choices": [choice]}


def chat(text: str | None, logprobs: list[Json] | None = None, finish_reason: str = "stop") -> Json:
    """vLLM's answer on `/chat/completions`."""
    message = {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": []}
    choice: Json = {
        "index": 0,
        "message": message,
        "logprobs": None if logprobs is None else {"content": logprobs},
        "finish_reason": finish_reason,
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "guard",
        "choices": [choice],
    }


#: Llama Guard 3's answers as vLLM gives them; probabilities of `safe` and `unsafe` by vllm-detector-adapter's tests.
SAFE = completion(
    ("\n\n", 0.0, {"\n\n": 0.0, '"\n\n': -29.68}), ("safe", -0.0013, {"safe": -0.0013, "unsafe": -6.61, "1": -16.9})
)


def unsafe(*codes: str) -> Json:
    """`unsafe` and its categories, by P = 0.9987."""
    listed = [(piece, 0.0, {piece: 0.0}) for code in ("\n" + ",".join(codes)).split() for piece in ("\n", code)]
    word = ("unsafe", -0.0013, {"unsafe": -0.0013, "safe": -6.61, "1": -16.9})
    return completion(("\n\n", 0.0, {"\n\n": 0.0}), word, *listed)
