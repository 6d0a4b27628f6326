"""Somebody else's server as an engine, byte by byte: what it says, how it fails, what it is sent."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from aim_kserve.errors import ServingError
from aim_runtime.engines.base import Json, ModelLoadError, RequestContext
from aim_runtime.engines.openai_server.engine import OpenAIServerEngine
from ports import free_ports
from raw_server import END, SSE_HEAD, Behaviour, RawServer, http, part, says, then_closes, then_resets

CHAT: Json = {"model": "ours", "messages": [{"role": "user", "content": "Hi"}]}
STREAM: Json = {**CHAT, "stream": True}
ANSWER = {"id": "1", "model": "theirs", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
CHUNK = b'{"id":"1","model":"theirs","choices":[{"index":0,"delta":{"content":"a"}}]}'
EVENT = b"data: " + CHUNK + b"\n\n"
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def loaded(server: RawServer, **options: Any) -> AsyncIterator[OpenAIServerEngine]:
    options = {"served_model_name": "ours", "start_timeout_s": 2, "probe_s": 60, **options}
    engine = OpenAIServerEngine(server.url, **options)
    await engine.load()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    async with RawServer() as server:
        yield server


@pytest.fixture
async def engine(server: RawServer) -> AsyncIterator[OpenAIServerEngine]:
    async with loaded(server) as engine:
        yield engine


def context(**more: Any) -> RequestContext:
    return RequestContext("abc", **more)


async def ask(engine: OpenAIServerEngine, body: Json = CHAT, asked: RequestContext | None = None) -> Any:
    return await engine.operations["chat/completions"](body, asked or context())


async def streamed(engine: OpenAIServerEngine, asked: RequestContext | None = None) -> list[bytes]:
    return [chunk async for chunk in await ask(engine, STREAM, asked)]


async def failure(engine: OpenAIServerEngine, body: Json = CHAT) -> ServingError:
    with pytest.raises(ServingError) as caught:
        await (streamed(engine) if body.get("stream") else ask(engine, body))
    return caught.value


async def idle(engine: OpenAIServerEngine) -> None:
    async with asyncio.timeout(5):
        while engine.stats().running or engine.stats().waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# --- what is sent, and what comes back ------------------------------------------------------------------------------


async def test_a_body_travels_as_received_but_for_the_models_name(
    server: RawServer, engine: OpenAIServerEngine
) -> None:
    server.behave = says(http(ANSWER))
    body = {**CHAT, "temperature": 0.1, "nobody_knows_this": {"x": [1, None, "ß"]}, "max_tokens": None}
    asked = context(headers={"traceparent": "00-1-2-01", "cookie": "secret"}, priority=3)
    answer = await ask(engine, body, asked)
    assert answer == {**ANSWER, "model": "ours"}
    assert (asked.usage.prompt_tokens, asked.usage.completion_tokens) == (3, 2)
    (seen,) = server.asked
    assert (seen.path, seen.body) == ("/v1/chat/completions", {**body, "model": "theirs"})
    assert seen.headers["traceparent"] == "00-1-2-01"
    assert seen.headers["x-request-id"] == "abc"
    assert "x-vllm-priority" not in seen.headers  # the order is ours: its queue stays empty
    assert "cookie" not in seen.headers


@pytest.mark.parametrize("odd", [functools.reduce(lambda inner, _: [inner], range(400), 1), "\ud800"])
async def test_a_body_that_cannot_be_sent_is_the_clients_error(engine: OpenAIServerEngine, odd: object) -> None:
    refused = await failure(engine, {**CHAT, "x": odd})
    assert refused.status == 400
    assert "the body cannot be passed on" in refused.message
    assert engine.stats().running == 0


async def test_the_servers_key_is_sent_and_asked_for(server: RawServer, tmp_path: Any) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    server.behave = says(http(ANSWER))
    async with loaded(server, key_file=key) as engine:
        await ask(engine)
        assert server.asked[0].headers["authorization"] == "Bearer s3cret"
        server.behave = says(http({"error": "no"}, 401))
        refused = await failure(engine)
        assert (refused.status, refused.code) == (502, "engine_key_refused")
    server.extra["/v1/models"] = http({"error": "no"}, 401)
    with pytest.raises(ModelLoadError, match="wants a key: give --server_key_file"):
        async with loaded(server):
            pass


async def test_a_stream_is_parsed_as_the_standard_says(server: RawServer, engine: OpenAIServerEngine) -> None:
    last = b'{"model": "theirs", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}'
    text = (
        b"\xef\xbb\xbf: a comment\r\n\r\n"
        + EVENT.replace(b"\n", b"\r\n")
        + b'data:{"model":"theirs",\ndata: "choices":[]}\nid: 7\n\n'  # one datum in two lines
        + b"retry: 1\n\n"
        + b"event: response.created\ndata: {}\n\n"
        + b"data: "
        + last
        + b"\n\n"
        + DONE
    )
    expected = [
        CHUNK.replace(b"theirs", b"ours"),
        b'{"model":"ours", "choices":[]}',
        b"event: response.created\ndata: {}",
        b'{"model":"ours", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}',
    ]
    for size in (1, 7, len(text)):
        server.behave = says(SSE_HEAD, *(part(text[at : at + size]) for at in range(0, len(text), size)), END)
        asked = context()
        assert await streamed(engine, asked) == expected
        assert (asked.usage.prompt_tokens, asked.usage.completion_tokens) == (5, 7)
    assert server.connections == 1  # read to its end, so kept


async def test_a_stream_of_the_responses_api_ends_with_its_last_event(
    server: RawServer, engine: OpenAIServerEngine
) -> None:
    usage = {"input_tokens": 4, "output_tokens": 6, "input_tokens_details": {"cached_tokens": 1}}
    event = b"event: response.completed\ndata: " + orjson.dumps({"response": {"usage": usage}}) + b"\n\n"
    server.behave = says(SSE_HEAD, part(event), END)
    asked = context()
    assert len(await streamed(engine, asked)) == 1
    assert (asked.usage.prompt_tokens, asked.usage.completion_tokens, asked.usage.cached_tokens) == (4, 6, 1)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (400, {"error": {"message": "no", "param": "n", "code": "bad_n"}}, (400, "no", "n", "bad_n")),
        (
            400,
            {"object": "error", "message": "long", "type": "BadRequestError", "code": 400},
            (400, "long", None, None),
        ),
        (422, {"detail": [{"loc": ["body"], "msg": "x"}]}, (422, '[{"loc":["body"],"msg":"x"}]', None, None)),
        (404, {"error": {"message": "who?", "param": "model", "code": 404}}, (404, "who?", "model", "model_not_found")),
        (413, {"error": "too large"}, (413, "too large", None, None)),
        (429, {"error": {"message": "slow"}}, (429, "slow", None, None)),
        (500, {"error": {"message": "cuda", "code": 500}}, (503, "cuda", None, None)),
        (501, {"error": {"message": "never", "code": 501}}, (501, "never", None, None)),
        (503, b"<html>", (503, "the server answered 503 and gave no reason", None, None)),
        (200, {"error": {"message": "late", "code": 400}}, (400, "late", None, None)),
        (200, {"object": "error", "message": "flat", "code": 404}, (404, "flat", None, None)),
        (307, b"", (502, "the server answered 307 instead of 200", None, "engine_answer_malformed")),
    ],
)
@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_refusals_keep_what_a_client_can_act_on(
    server: RawServer, engine: OpenAIServerEngine, status: int, said: Any, expected: tuple[object, ...], body: Json
) -> None:
    server.behave = says(http(said, status, retry_after="7"))
    refused = await failure(engine, body)
    assert (refused.status, refused.message, refused.param, refused.code) == expected
    if refused.status == 503:
        assert refused.headers()["retry-after"] == "7"


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"error": {"message": "full", "type": "service_unavailable", "code": "engine_full"}}, (503, "engine_full")),
        ({"error": {"object": "error", "message": "bad", "type": "BadRequestError", "code": 400}}, (400, None)),
        ({"error": {"message": "limits", "type": "rate_limit_error"}}, (429, None)),
    ],
)
async def test_an_error_event_is_an_error_before_and_amid_the_stream(
    server: RawServer, engine: OpenAIServerEngine, event: Json, expected: tuple[int, str | None]
) -> None:
    error = b"data: " + orjson.dumps(event) + b"\n\n"
    server.behave = says(SSE_HEAD, part(error + DONE), END)
    with pytest.raises(ServingError) as early:
        await ask(engine, STREAM)  # nothing has been answered yet: it can still be a status
    assert (early.value.status, early.value.code) == expected
    server.behave = says(SSE_HEAD, part(EVENT), part(error + DONE), END)
    stream = await ask(engine, STREAM)
    assert await anext(stream) == CHUNK.replace(b"theirs", b"ours")
    with pytest.raises(ServingError) as late:
        await anext(stream)
    assert (late.value.status, late.value.code) == expected
    await idle(engine)


# --- hostile servers ------------------------------------------------------------------------------------------------

HALF = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"id"'


@pytest.mark.parametrize(
    ("behave", "status"),
    [
        (then_closes(HALF), 503),
        (then_resets(HALF), 503),
        (then_closes(b""), 503),
        (then_resets(b""), 503),
        (says(http(b"<html>", kind="text/html")), 502),
        (says(http(b"[1]")), 502),
        (says(http(b"")), 502),
        (says(b"SSH-2.0-OpenSSH\r\n\r\n"), 502),
        (says(b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"), 502),
        (says(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n"), 502),
    ],
)
async def test_an_answer_that_is_none(
    server: RawServer, engine: OpenAIServerEngine, behave: Behaviour, status: int
) -> None:
    server.behave = behave
    assert (await failure(engine)).status == status
    await idle(engine)
    server.behave = says(http(ANSWER))
    assert (await ask(engine))["id"] == "1"  # and the next one is none the worse


@pytest.mark.parametrize(
    ("behave", "status", "chunks"),
    [
        (then_closes(SSE_HEAD, part(EVENT)), 503, 1),
        (then_resets(SSE_HEAD, part(EVENT)), 503, 1),
        (then_closes(SSE_HEAD, part(EVENT + EVENT[:20])), 503, 1),
        (says(SSE_HEAD, part(EVENT), END), 503, 1),  # ended, but without [DONE]
        (says(SSE_HEAD, part(EVENT + b"data: {half\n\n")), 502, 1),
        (says(SSE_HEAD, part(EVENT + b"data: 3\n\n")), 502, 1),
        (says(SSE_HEAD, part(EVENT), b"no chunk\r\n"), 503, 1),
        (says(SSE_HEAD, END), 503, 0),
        (says(http(ANSWER)), 502, 0),  # not a stream at all
        (says(SSE_HEAD, part(EVENT), *[part(b"data: " + b"x" * 2**20)] * 10), 502, 1),  # a line of 10 MiB
    ],
)
async def test_a_stream_that_breaks(
    server: RawServer, engine: OpenAIServerEngine, behave: Behaviour, status: int, chunks: int
) -> None:
    server.behave = behave
    got: list[bytes] = []

    async def collect() -> None:
        async for chunk in await ask(engine, STREAM):
            got.append(chunk)  # noqa: PERF401  what came before it broke counts

    with pytest.raises(ServingError) as caught:
        await asyncio.wait_for(collect(), 10)
    assert (caught.value.status, len(got)) == (status, chunks)
    await idle(engine)


async def test_a_silent_server_is_not_waited_for_for_ever(server: RawServer) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for byte in EVENT + DONE:
            writer.write(part(bytes([byte])))
            await asyncio.sleep(0.001)
        await asyncio.sleep(60)

    async def mute(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async with loaded(server, silence_timeout_s=0.3) as engine:
        server.behave = drip  # slow, but it moves
        assert len(await streamed(engine)) == 1
        server.behave = mute
        silent = await failure(engine)
        assert (silent.status, silent.code) == (504, "engine_timeout")
        await idle(engine)


async def test_nobody_there(server: RawServer, engine: OpenAIServerEngine) -> None:
    await server.__aexit__()
    await asyncio.sleep(0.1)
    refused = await failure(engine)
    assert (refused.status, refused.code, refused.headers()["retry-after"]) == (503, "engine_unreachable", "1")


# --- connections ----------------------------------------------------------------------------------------------------


async def test_a_request_is_sent_again_only_if_a_kept_connection_was_closed_before_a_byte(
    server: RawServer, engine: OpenAIServerEngine
) -> None:
    server.behave = says(http(ANSWER))
    await ask(engine)
    turns = iter([then_closes(b""), says(http(ANSWER))])

    async def first_closes(writer: asyncio.StreamWriter) -> None:
        await next(turns)(writer)

    server.behave = first_closes
    assert (await ask(engine))["id"] == "1"
    assert len(server.asked) == 3
    for sent in (b"", HALF[:20]):  # twice on kept connections, or with a byte answered: told, not tried again
        server.behave = then_closes(sent)
        before = len(server.asked)
        assert (await failure(engine)).status in (502, 503)
        assert len(server.asked) - before <= 2
        assert server.connections > 1


async def test_leaving_closes_the_connection(server: RawServer, engine: OpenAIServerEngine) -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        while True:
            writer.write(part(EVENT))
            await writer.drain()
            await asyncio.sleep(0.005)

    async def until_closed(count: int) -> None:
        async with asyncio.timeout(5):
            while server.closed_by_client < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await idle(engine)

    server.behave = endless
    stream = await ask(engine, STREAM)
    await anext(stream)
    await anext(stream)
    assert engine.stats().running == 1
    await stream.aclose()
    await until_closed(1)
    stream = await ask(engine, STREAM)  # never begun
    await stream.aclose()
    await until_closed(2)
    stream = await ask(engine, STREAM)  # forgotten
    del stream
    gc.collect()
    await until_closed(3)
    unary = asyncio.ensure_future(ask(engine))
    await asyncio.sleep(0.05)
    unary.cancel()
    await until_closed(4)


async def test_connections_and_waiting_requests_are_bounded(server: RawServer) -> None:
    free = asyncio.Event()
    most = 0

    async def slow(writer: asyncio.StreamWriter) -> None:
        nonlocal most
        most = max(most, len(server.asked) - answered)
        await free.wait()
        writer.write(http(ANSWER))

    async with loaded(server, most=2, max_waiting=3) as engine:
        answered = 0
        server.behave = slow
        tasks = [asyncio.create_task(ask(engine)) for _ in range(5)]
        await asyncio.sleep(0.1)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.slots_total) == (2, 3, 2)
        refused = await failure(engine)
        assert (refused.status, refused.code) == (503, "engine_full")
        assert len(server.asked) == most == 2
        free.set()
        assert [(await task)["id"] for task in tasks] == ["1"] * 5
        await idle(engine)


async def test_draining_waits_and_then_ends_what_is_left(server: RawServer) -> None:
    async def mute(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def half(writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + part(EVENT))
        await asyncio.sleep(60)

    async with loaded(server) as engine:
        server.behave = mute
        unary = asyncio.create_task(failure(engine))
        await asyncio.sleep(0.05)
        server.behave = half
        stream = asyncio.create_task(failure(engine, STREAM))
        await asyncio.sleep(0.05)
        assert engine.stats().running == 2
        await engine.drain(0.1)
        for task in (unary, stream):
            error = await asyncio.wait_for(task, 5)
            assert (error.status, error.code) == (503, "shutting_down")


# --- what it learns of the server -----------------------------------------------------------------------------------


async def test_what_the_server_has_is_read_off_its_description(server: RawServer) -> None:
    paths = {"/v1/chat/completions": {"post": {}}, "/v1/completions": {"post": {}}, "/tokenize": {"post": {}}}
    described = {**paths, "/v1/responses": {"get": {}}, "/v1/secret": {"post": {}}}
    server.extra["/openapi.json"] = http({"paths": described})
    server.extra["/version"] = http({"version": "0.32.0"})
    server.behave = says(http({"count": 1}))
    async with loaded(server) as engine:
        assert sorted(engine.operations) == ["chat/completions", "completions", "tokenize"]
        assert (engine.version, engine.max_model_len, engine.adapters) == ("0.32.0", 4096, ())
        assert engine.requests == dict.fromkeys(engine.operations)
        await engine.operations["tokenize"]({"prompt": "x"}, context())
        assert server.asked[-1].path == "/tokenize"
    async with loaded(server, operations=["embeddings"], max_model_len=99) as engine:
        assert (list(engine.operations), engine.max_model_len) == (["embeddings"], 99)


async def test_a_server_that_describes_nothing_has_what_every_one_has(engine: OpenAIServerEngine) -> None:
    assert sorted(engine.operations) == ["chat/completions", "completions"]


async def test_adapters_of_the_server_are_names_of_the_model(server: RawServer) -> None:
    cards = [{"id": "theirs", "parent": None}, {"id": "lora", "parent": "theirs"}, {"id": "x", "parent": "other"}]
    server.extra["/v1/models"] = http({"object": "list", "data": cards})
    server.behave = says(http({**ANSWER, "model": "lora"}))
    async with loaded(server) as engine:
        assert engine.adapters == ("lora",)
        assert (await ask(engine, {**CHAT, "model": "lora"}))["model"] == "lora"
        assert server.asked[-1].body["model"] == "lora"


@pytest.mark.parametrize(
    ("models", "options", "says_"),
    [
        (("a", "b"), {}, r"has 2 models \(a, b\): choose one with --server_model"),
        (("a", "b"), {"model": "c"}, "does not have the model 'c'; it has: a, b"),
        ((), {}, r"has 0 models \(none\)"),
    ],
)
async def test_a_model_that_is_not_there(models: tuple[str, ...], options: Json, says_: str) -> None:
    async with RawServer(models=models) as server:
        with pytest.raises(ModelLoadError, match=says_):
            async with loaded(server, **options):
                pass


async def test_a_server_that_is_none_or_never_ready() -> None:
    async with RawServer(extra={"/v1/models": http(b"<html>", kind="text/html")}) as server:
        with pytest.raises(ModelLoadError, match="no list of models: this is no server of OpenAI's API"):
            async with loaded(server):
                pass
        server.extra["/health"] = http(b"", 503)
        with pytest.raises(ModelLoadError, match=r"did not become ready within 0\.3 s"):
            async with loaded(server, start_timeout_s=0.3):
                pass
    nobody = OpenAIServerEngine(f"http://127.0.0.1:{free_ports(1)[0]}", served_model_name="ours", start_timeout_s=0.3)
    with pytest.raises(ModelLoadError, match="did not become ready"):
        await nobody.load()


async def test_health_follows_the_server(server: RawServer) -> None:
    async def until(engine: OpenAIServerEngine, healthy: bool) -> None:
        async with asyncio.timeout(5):
            while engine.healthy() is not healthy:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async with loaded(server, probe_s=0.02) as engine:
        assert engine.healthy()
        server.extra["/health"] = http(b"", 503)
        await until(engine, False)
        server.extra["/health"] = http(b"")
        await until(engine, True)
        assert engine.stats().state == "ready"
        await server.__aexit__()
        await until(engine, False)
        assert engine.stats().state == "unreachable"


METRICS = {
    "vllm": (
        '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0",model_name="theirs"} 3.0\n'
        'vllm:num_requests_running{engine="1",model_name="theirs"} 2.0\n'
        'vllm:num_requests_waiting{engine="0",model_name="theirs"} 4.0\n'
        'vllm:kv_cache_usage_perc{engine="0",model_name="theirs"} 0.25\n'
        'vllm:kv_cache_usage_perc{engine="1",model_name="theirs"} 0.5\n'
        'vllm:num_requests_running{engine="0",model_name="another"} 100.0\n'
    ),
    "sglang": (
        "# HELP sglang:num_running_reqs The number of running requests\n# TYPE sglang:num_running_reqs gauge\n"
        'sglang:num_running_reqs{model_name="theirs"} 5.0\n'
        'sglang:num_running_reqs{model_name="theirs",priority="1"} 5.0\n'
        'sglang:num_queue_reqs{model_name="theirs"} 4.0\nsglang:token_usage{model_name="theirs"} 0.5\n'
    ),
    "llama-server": "llamacpp:requests_processing 5\nllamacpp:requests_deferred 4\nllamacpp:kv_cache_usage_ratio 0.5\n",
}


@pytest.mark.parametrize("who", METRICS)
async def test_load_is_read_off_the_servers_metrics(server: RawServer, who: str) -> None:
    server.extra["/metrics"] = http(METRICS[who].encode(), kind="text/plain")
    async with loaded(server) as engine:
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_cache_usage) == (5, 4, 0.5)


@pytest.mark.parametrize(
    "text", [b"\xff<html>", b"vllm:num_requests_running{ 3", b"vllm:num_requests_running NaN\n", b""]
)
async def test_metrics_that_are_none(server: RawServer, text: bytes) -> None:
    server.extra["/metrics"] = http(text, kind="text/plain")
    async with loaded(server) as engine:
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, None)


@pytest.mark.parametrize(
    "odd",
    [
        {"usage": 5},
        {"usage": [1]},
        {"response": 5},
        {"response": {"usage": 7}},
        {"usage": {"prompt_tokens": -5, "completion_tokens": "7", "prompt_tokens_details": 5}},
        {"usage": {"prompt_tokens": True, "completion_tokens": 1.5, "prompt_tokens_details": {"cached_tokens": None}}},
    ],
)
async def test_usage_that_is_none_is_not_counted(server: RawServer, engine: OpenAIServerEngine, odd: Json) -> None:
    asked = context()
    server.behave = says(http({**ANSWER, "usage": None, **odd}))
    assert (await ask(engine, CHAT, asked))["id"] == "1"
    server.behave = says(
        SSE_HEAD, part(b"data: " + orjson.dumps({**ANSWER, "usage": None, **odd}) + b"\n\n"), part(DONE), END
    )
    assert len(await streamed(engine, asked)) == 1
    assert (asked.usage.prompt_tokens, asked.usage.completion_tokens, asked.usage.cached_tokens) == (0, 0, 0)
