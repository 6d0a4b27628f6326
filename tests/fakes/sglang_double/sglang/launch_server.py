"""``python -m sglang.launch_server`` as its documentation and recorded answers have it, computing nothing.

SGLang needs a GPU and its own image. What is recorded: the flags (docs.sglang.io, "Server Arguments"), the answers of
``/v1/models``, ``/server_info``, ``/metrics`` and of chat completions (SGLang 0.5, as its documentation prints them),
the flat error objects, a scheduler process beside the server, and that the port opens only once the model is loaded.

A model directory that holds ``crash``, ``hang`` or ``stubborn`` makes it do so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from aiohttp import web

VERSION = "0.5.23"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sglang.launch_server", allow_abbrev=False)
    parser.add_argument("--model-path", required=True, type=Path)
    parser.add_argument("--served-model-name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--tensor-parallel-size", "--tp-size", type=int, default=1, dest="tp_size")
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--max-running-requests", type=int)
    parser.add_argument("--enable-metrics", action="store_true")
    parser.add_argument("--attention-backend")
    return parser.parse_args()


class Server:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.name = args.served_model_name or str(args.model_path)
        self.started = time.monotonic()
        self.running = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self.health)
        app.router.add_get("/health_generate", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/server_info", self.info)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/openapi.json", self.described)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.complete)
        return app

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if time.monotonic() - self.started > 0.2 else 503)  # it warms up first

    async def models(self, _: web.Request) -> web.Response:
        card = {"id": self.name, "object": "model", "created": 1786898113, "owned_by": "sglang", "root": self.name}
        length = self.args.context_length or 131072
        return web.json_response({"object": "list", "data": [{**card, "parent": None, "max_model_len": length}]})

    async def info(self, _: web.Request) -> web.Response:
        args = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.args).items()}
        state = {**args, "effective_max_running_requests_per_dp": self.args.max_running_requests or 128}
        told = {"status": "ready", "max_total_num_tokens": 20480, "internal_states": [state], "version": VERSION}
        return web.json_response({**args, **told})

    async def metrics(self, _: web.Request) -> web.Response:
        label = f'{{model_name="{self.name}"}}'
        gauges = {"num_running_reqs": self.running, "num_queue_reqs": 0, "token_usage": 0.28, "gen_throughput": 86.5}
        lines = [
            f"# HELP sglang:{name} x\n# TYPE sglang:{name} gauge\nsglang:{name}{label} {value}"
            for name, value in gauges.items()
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def described(self, _: web.Request) -> web.Response:
        posted = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/generate", "/v1/tokenize", "/tokenize")
        return web.json_response({"openapi": "3.1.0", "paths": {path: {"post": {}} for path in posted}})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = " ".join(str(message["content"]) for message in body["messages"])
        return await self._answer(request, body, prompt, chat=True)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await self._answer(request, body, body["prompt"], chat=False)

    async def _answer(self, request: web.Request, body: dict, prompt: str, *, chat: bool) -> web.StreamResponse:
        if body["model"] != self.name:
            return refusal(f"The model `{body['model']}` does not exist.", 404)
        most = body.get("max_tokens") or 16
        if most > (self.args.context_length or 131072):
            return refusal(f"Requested token count exceeds the model's maximum context length of {most} tokens.", 400)
        words = [f" word{index}" for index in range(most)]
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": most, "prompt_tokens_details": None}
        usage |= {"total_tokens": usage["prompt_tokens"] + most, "reasoning_tokens": 0}
        self.running += 1
        try:
            if body.get("stream"):
                return await self._stream(request, body, words, usage, chat=chat)
            choice = self._choice("".join(words), "message" if chat else None) | {"finish_reason": "length"}
            kind = "chat.completion" if chat else "text_completion"
            return web.json_response(
                {**self._frame(kind, [choice]), "usage": usage, "metadata": {"weight_version": "d"}}
            )
        finally:
            self.running -= 1

    async def _stream(self, request, body, words, usage, *, chat: bool) -> web.StreamResponse:  # noqa: ANN001
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        kind = "chat.completion.chunk" if chat else "text_completion"
        for word in words:
            frame = {**self._frame(kind, [self._choice(word, "delta" if chat else None)]), "usage": None}
            await response.write(b"data: " + json.dumps(frame).encode() + b"\n\n")
            await asyncio.sleep(0.001)
        last = {**self._choice("", "delta" if chat else None), "finish_reason": "length"}
        await response.write(b"data: " + json.dumps(self._frame(kind, [last])).encode() + b"\n\n")
        if (body.get("stream_options") or {}).get("include_usage"):
            await response.write(b"data: " + json.dumps({**self._frame(kind, []), "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    def _frame(self, kind: str, choices: list[dict]) -> dict:
        return {"id": "669d24a3423f4012", "object": kind, "created": 1787195762, "model": self.name, "choices": choices}

    def _choice(self, text: str, place: str | None) -> dict:
        said = {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": None}
        content = {"text": text} if place is None else {place: said}
        return {"index": 0, **content, "logprobs": None, "finish_reason": None, "matched_stop": None}


def refusal(message: str, status: int) -> web.Response:
    kind = {400: "BadRequestError", 404: "NotFoundError"}[status]
    body = {"object": "error", "message": message, "type": kind, "param": None, "code": status}
    return web.json_response(body, status=status)


def main() -> None:
    args = arguments()
    scheduler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print(f"[2026-11-01 10:00:00] server_args={args} scheduler={scheduler.pid}", flush=True)
    if (args.model_path / "crash").exists():
        print("Traceback (most recent call last):\n  File ...\nRuntimeError: Not enough memory. Please try to increase")
        print("[2026-11-01 10:00:01] Received sigquit from a child process. It usually means the child failed.")
        sys.exit(137)
    if (args.model_path / "stubborn").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (args.model_path / "hang").exists():
        time.sleep(600)
    web.run_app(Server(args).app(), host=args.host, port=args.port, print=None, handle_signals=False)


if __name__ == "__main__":
    main()
