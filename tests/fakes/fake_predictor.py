"""A predictor that computes nothing and does what it is told: OpenAI, V1, V2 (REST and gRPC), with settable faults.

It answers with an echo of the prompt, in the shapes vLLM and KServe answer with. What it is to do otherwise comes with
each request, in the header (or gRPC metadata) ``x-fake``, a JSON object:

``say``        the answer's text instead of the echo; ``says`` one for each choice (n)
``tokens``     the stream's pieces instead of words; ``[[choice, piece], …]`` to interleave
``content``, ``deltas``  of ``/v1/messages``: the content blocks, or their starts and deltas
``delta``      the name of the streamed field instead of ``content``
``status``, ``body``, ``headers``   answer exactly this
``raw``        for a stream: these bytes (latin-1) instead of ours, ``times`` over
``chunks``     cut the stream's bytes into chunks of this many, one write each
``drop_after`` close the connection after that many bytes of the answer's body (0: instead of answering)
``hang_after`` fall silent after that many bytes (-1: before the answer begins)
``token_s``    seconds between the pieces of a stream

``python fake_predictor.py PORT`` serves until it is killed; tests run it in a thread: ``with FakePredictor() as p``.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import orjson
from aiohttp import web

from listening import answering
from ports import free_ports

Json = dict[str, Any]
CHUNK: Json = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}


class FakePredictor:
    """``seen``: every request as it came, last one last; ``open``: requests not yet answered or given up."""

    def __init__(self, port: int | None = None, *, grpc: bool = False, tls: ssl.SSLContext | None = None) -> None:
        ports = free_ports(2)
        self.port = port or ports[0]
        self.grpc_port = ports[1]
        self.host = f"127.0.0.1:{self.port}"
        self.seen: list[Json] = []
        self.connections: set[str] = set()
        self.ready = True
        self.open = 0
        self._grpc, self._tls = grpc, tls
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def last(self) -> Json:
        return self.seen[-1]

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self.serve())

    async def serve(self) -> None:
        self._stop = asyncio.Event()
        async with answering(self._answer, self.port, self._tls):
            grpc_server = await _serve_grpc(self, self.grpc_port) if self._grpc else None
            self._started.set()
            await self._stop.wait()
            if grpc_server is not None:
                await grpc_server.stop(0)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        head = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in request.raw_headers]
        self.seen.append({"method": request.method, "path": request.raw_path, "headers": head, "body": body})
        assert request.transport is not None
        self.connections.add(str(request.transport.get_extra_info("peername")))
        orders = orjson.loads(request.headers.get("x-fake", "{}"))
        self.open += 1
        try:
            if orders.get("hang_after") == -1:
                await asyncio.sleep(3600)
            status, headers, pieces = self._compose(request, body, orders)
            return await _send(request, orders, status, headers, pieces)
        finally:
            self.open -= 1

    def _compose(self, request: web.Request, body: bytes, orders: Json) -> tuple[int, Json, list[bytes]]:
        if "status" in orders:
            return orders["status"], orders.get("headers", {}), [orders.get("body", "").encode()]
        if "raw" in orders:
            return (
                200,
                {"content-type": "text/event-stream"},
                [orders["raw"].encode("latin-1") * orders.get("times", 1)],
            )
        json_length = request.headers.get("inference-header-content-length")
        asked: Json = orjson.loads(body[: int(json_length) if json_length else None] or b"{}")
        if asked.get("stream"):
            return 200, {"content-type": "text/event-stream; charset=utf-8"}, list(_stream(request.path, asked, orders))
        if json_length:
            return (
                200,
                _binary_headers(int(json_length)),
                [body.replace(b'"inputs"', b'"outputs"').replace(b"{", b'{"model_name":"m",', 1)],
            )
        answer = _whole(request, asked, orders, ready=self.ready)
        if answer is None:
            return 404, {"content-type": "application/json"}, [orjson.dumps({"detail": "Not Found"})]
        return 200, {"content-type": "application/json", **orders.get("headers", {})}, [orjson.dumps(answer)]


def _binary_headers(length: int) -> Json:
    grown = length + len('{"model_name":"m",') - 1 + len('"outputs"') - len('"inputs"')
    return {"content-type": "application/octet-stream", "inference-header-content-length": str(grown)}


async def _send(
    request: web.Request, orders: Json, status: int, headers: Json, pieces: list[bytes]
) -> web.StreamResponse:
    drop, hang, size = orders.get("drop_after"), orders.get("hang_after"), orders.get("chunks")
    assert request.transport is not None
    if drop == 0:
        request.transport.abort()
        return web.Response()
    response = web.StreamResponse(status=status, headers=headers)
    if len(pieces) == 1 and drop is None and hang is None and size is None:
        response.content_length = len(pieces[0])
    await response.prepare(request)
    if size is not None:
        whole = b"".join(pieces)
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    sent = 0
    for piece in pieces:
        limit = drop if drop is not None else hang
        if limit is not None and sent + len(piece) > limit:
            await response.write(piece[: limit - sent])
            if hang is not None:
                await asyncio.sleep(3600)
            await asyncio.sleep(0.01)  # what has been written leaves before the reset
            request.transport.abort()
            return response
        await response.write(piece)
        sent += len(piece)
        if size is not None or orders.get("token_s"):
            await asyncio.sleep(orders.get("token_s", 0))
    await response.write_eof()
    return response


def _prompt(asked: Json) -> str:
    if "messages" in asked:
        content = asked["messages"][-1]["content"]
        return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
    prompt = asked.get("prompt", asked.get("input", ""))
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _whole(request: web.Request, asked: Json, orders: Json, *, ready: bool) -> Json | None:
    path = request.path.removeprefix("/openai")
    if path.startswith("/v1/models/") and path.endswith(":predict"):
        return {"predictions": [orders.get("say", instance) for instance in asked["instances"]]}
    if path.endswith("/infer"):
        outputs = [{**tensor, "name": "text"} for tensor in asked["inputs"]]
        return {"id": asked.get("id"), "model_name": "m", "model_version": "1", "outputs": outputs}
    known: dict[str, Json] = {
        "/v1/models": {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "fake"}], "models": ["m"]},
        "/v1/models/m": {"id": "m", "object": "model", "name": "m", "ready": ready},
        "/v2/models/m": {
            "name": "m",
            "platform": "fake",
            "inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        },
    }
    if path in known:
        return known[path]
    say = orders.get("say", _prompt(asked))
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    says = orders.get("says", [say] * asked.get("n", 1))
    if path == "/v1/chat/completions":
        choices = [_chat_choice(index, text, orders, asked) for index, text in enumerate(says)]
        return {**CHUNK, "object": "chat.completion", "choices": choices, "usage": usage}
    if path == "/v1/completions":
        choices = [
            {"index": index, "text": text, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
            for index, text in enumerate(says)
        ]
        return {**CHUNK, "id": "cmpl-1", "object": "text_completion", "choices": choices, "usage": usage}
    if path == "/v1/embeddings":
        texts = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
        data = [{"object": "embedding", "index": i, "embedding": [0.25, float(len(t))]} for i, t in enumerate(texts)]
        return {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}}
    if path == "/v1/responses":
        return _response(say, "completed")
    if path == "/v1/messages":
        return _message(orders.get("content") or [{"type": "text", "text": say}])
    if path == "/tokenize":
        return {"count": 3, "max_model_len": 100, "tokens": [1, 2, 3], "prompt": asked.get("prompt")}
    return None


def _chat_choice(index: int, text: str, orders: Json, asked: Json) -> Json:
    message: Json = {"role": "assistant", "content": text, "refusal": None, "tool_calls": [], "reasoning": None}
    message |= orders.get("message", {})
    logprobs = None
    if asked.get("logprobs"):
        logprobs = {
            "content": [
                {"token": t, "logprob": -0.1, "bytes": list(t.encode()), "top_logprobs": []} for t in text.split()
            ]
        }
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": "stop", "stop_reason": None}


def words(text: str) -> list[str]:
    """A text in pieces as a tokenizer has them: words with the space before them."""
    return [" " * (index > 0) + word for index, word in enumerate(text.split(" "))]


def _stream(path: str, asked: Json, orders: Json) -> Iterator[bytes]:
    text = orders.get("say", _prompt(asked))
    path = path.removeprefix("/openai")
    if path == "/v1/responses":
        yield from _response_events(text, orders)
        return
    if path == "/v1/messages":
        yield from _message_events(text, orders)
        return
    pieces = orders.get("tokens") or words(text)
    pairs = [piece if isinstance(piece, list) else [0, piece] for piece in pieces]
    chat = path == "/v1/chat/completions"
    name = orders.get("delta", "content")

    def frame(choices: list[Json], **more: Any) -> bytes:
        return b"data: " + orjson.dumps({**CHUNK, "choices": choices, **more}) + b"\n\n"

    indices = sorted({index for index, _ in pairs})
    if chat:
        for index in indices:
            delta = {"role": "assistant", "content": ""}
            yield frame([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
    for index, piece in pairs:
        content: Json = {"delta": {name: piece} if isinstance(piece, str) else piece} if chat else {"text": piece}
        logprobs = {"content": [{"token": piece, "logprob": -1}]} if asked.get("logprobs") else None
        yield frame([{"index": index, **content, "logprobs": logprobs, "finish_reason": None}])
    for index in indices:
        content = {"delta": {}} if chat else {"text": ""}
        yield frame([{"index": index, **content, "logprobs": None, "finish_reason": "stop", "stop_reason": None}])
    if (asked.get("stream_options") or {}).get("include_usage"):
        yield frame([], usage={"prompt_tokens": 5, "completion_tokens": len(pairs), "total_tokens": 5 + len(pairs)})
    yield b"data: [DONE]\n\n"


def _message(content: list[Json]) -> Json:
    """As vLLM and Anthropic answer ``/v1/messages``."""
    about = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None}
    return {**about, "content": content, "stop_reason": "end_turn", "usage": {"input_tokens": 5, "output_tokens": 7}}


def _message_events(text: str, orders: Json) -> Iterator[bytes]:
    """``orders["deltas"]``: ``[block, its start, its deltas]`` each, instead of one block of the text's pieces."""

    def event(kind: str, **payload: Any) -> bytes:
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **payload}) + b"\n\n"

    said = [{"type": "text_delta", "text": piece} for piece in orders.get("tokens") or words(text)]
    blocks = orders.get("deltas") or [[{"type": "text", "text": ""}, said]]
    yield event("message_start", message={**_message([]), "stop_reason": None})
    yield event("ping")
    for index, (start, deltas) in enumerate(blocks):
        yield event("content_block_start", index=index, content_block=start)
        for delta in deltas:
            yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    reason = {"stop_reason": "end_turn", "stop_sequence": None}
    yield event("message_delta", delta=reason, usage={"output_tokens": 7})
    yield event("message_stop")


def _response(text: str, status: str) -> Json:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": status, "content": [part]}
    output = [message] if status == "completed" else []
    return {
        **{"id": "resp_1", "object": "response", "created_at": 1700000000, "model": "m", "status": status},
        **{"output": output, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}},
    }


def _response_events(text: str, orders: Json) -> Iterator[bytes]:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    done = _response(text, "completed")
    item = done["output"][0]
    number = itertools.count()

    def event(kind: str, **payload: Any) -> bytes:
        data = orjson.dumps({"type": kind, **payload, "sequence_number": next(number)})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    yield event("response.created", response=_response(text, "in_progress"))
    yield event("response.output_item.added", output_index=0, item={**item, "content": [], "status": "in_progress"})
    yield event("response.content_part.added", **place, part={**item["content"][0], "text": ""})
    for piece in orders.get("tokens") or words(text):
        yield event("response.output_text.delta", **place, delta=piece, logprobs=[])
    yield event("response.output_text.done", **place, text=text, logprobs=[])
    yield event("response.content_part.done", **place, part=item["content"][0])
    yield event("response.output_item.done", output_index=0, item=item)
    yield event("response.completed", response=done)


async def _serve_grpc(fake: FakePredictor, port: int) -> Any:
    import grpc
    from grpc import aio

    from aim_kserve.kserve import pb, pb_grpc

    class Servicer(pb_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
        async def ModelReady(self, request: Any, context: Any) -> Any:
            return pb.ModelReadyResponse(ready=fake.ready)

        async def ModelMetadata(self, request: Any, context: Any) -> Any:
            tensor = pb.ModelMetadataResponse.TensorMetadata(name="prompt", datatype="BYTES", shape=[-1])
            return pb.ModelMetadataResponse(name=request.name, platform="fake", inputs=[tensor], outputs=[tensor])

        async def ModelInfer(self, request: Any, context: Any) -> Any:
            metadata = [(key, value) for key, value in context.invocation_metadata()]
            fake.seen.append({"method": "GRPC", "headers": metadata, "body": request})
            orders = orjson.loads(dict(metadata).get("x-fake", "{}"))
            if "code" in orders:
                await context.abort(grpc.StatusCode[orders["code"]], orders["message"])
            answer = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
            for tensor in request.inputs:
                output = answer.outputs.add(name="text", datatype=tensor.datatype, shape=tensor.shape)
                output.contents.CopyFrom(tensor.contents)
            answer.raw_output_contents.extend(request.raw_input_contents)
            return answer

    server = aio.server(options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server


if __name__ == "__main__":
    asyncio.run(FakePredictor(int(sys.argv[1])).serve())
