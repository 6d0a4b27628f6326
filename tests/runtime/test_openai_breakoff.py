"""Clients that leave: the engine stops computing for them, and nobody else notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import httpx
import orjson
import pytest

from aim_kserve.kserve import pb, pb_grpc
from served import Served

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "hi"}]
LONG = {"model": "m", "messages": ASK, "max_tokens": 100_000}
#: Of an answer that would take 500 seconds: 100,000 tokens of 5 ms. A busy machine takes its time, too.
WITHIN_S = 2.0


async def state(client: httpx.AsyncClient) -> dict[str, object]:
    answer: dict[str, object] = (await client.post("/v1/fake/state", json={})).json()
    return answer


async def seconds_until_idle(client: httpx.AsyncClient) -> float:
    started = time.perf_counter()
    while (await state(client))["running"] != 0:
        assert time.perf_counter() - started < 5, "the engine is still computing for a client that left"
    return time.perf_counter() - started


@pytest.fixture(scope="module")
def slow() -> Iterator[Served]:
    with Served.fake(slots=8, token_s=0.005) as server:
        yield server


@pytest.fixture
async def client(slow: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=slow.url, timeout=30) as client:
        yield client


async def break_off(client: httpx.AsyncClient) -> None:
    async with client.stream("POST", CHAT, json={**LONG, "stream": True}) as stream:
        lines = stream.aiter_lines()
        for _ in range(4):
            await anext(lines)
        await lines.aclose()


async def test_200_broken_streams_then_50_normal_ones(client: httpx.AsyncClient) -> None:
    before = len((await state(client))["aborted"])  # type: ignore[arg-type]
    slowest = 0.0
    for _ in range(25):
        await asyncio.gather(*(break_off(client) for _ in range(8)))  # all eight slots
        slowest = max(slowest, await seconds_until_idle(client))
    assert slowest < WITHIN_S
    assert len((await state(client))["aborted"]) - before == 200  # type: ignore[arg-type]
    normal = [client.post(CHAT, json={"model": "m", "messages": ASK, "stream": True}) for _ in range(50)]
    answers = await asyncio.gather(*normal)
    assert all(answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n") for answer in answers)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, LONG),
        ("/v1/models/m:predict", {"instances": [{"prompt": "x", "max_tokens": 100_000}]}),
        (
            "/v2/models/m/infer",
            {
                "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["x"]}],
                "parameters": {"max_tokens": 100_000},
            },
        ),
    ],
)
async def test_unary_requests_end_with_their_client(client: httpx.AsyncClient, path: str, body: object) -> None:
    waiting = asyncio.create_task(client.post(path, json=body))
    while (await state(client))["running"] == 0:
        assert not waiting.done(), waiting.result().text
    waiting.cancel()
    assert await seconds_until_idle(client) < WITHIN_S


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [1, 3])
async def test_requests_in_one_go_end_with_their_client(
    client: httpx.AsyncClient, slow: Served, stream: bool, queued: int
) -> None:
    """uvicorn tells the last request of a connection that its client has left, and this one has not even begun."""
    content = orjson.dumps({**LONG, "stream": stream})
    one = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(content)) + content
    _, writer = await asyncio.open_connection("127.0.0.1", slow.http_port)
    writer.write(one * (1 + queued))
    while (await state(client))["running"] == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    writer.close()
    await seconds_until_idle(client)
    await asyncio.sleep(0.1)
    assert (await state(client))["running"] == 0
    assert "Traceback" not in slow.stderr()


async def test_grpc_requests_end_with_their_client(client: httpx.AsyncClient, slow: Served) -> None:
    async with grpc.aio.insecure_channel(slow.grpc_url) as channel:
        request = pb.ModelInferRequest(model_name="m")
        tensor = request.inputs.add(name="prompt", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(b"x")
        request.parameters["max_tokens"].int64_param = 100_000
        call = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
        waiting = asyncio.ensure_future(call)
        while (await state(client))["running"] == 0:
            assert not waiting.done()
        call.cancel()
        assert await seconds_until_idle(client) < WITHIN_S
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_client_that_left_is_logged_as_such(client: httpx.AsyncClient, slow: Served) -> None:
    headers = {"x-request-id": "left-early"}
    waiting = asyncio.create_task(client.post(CHAT, json=LONG, headers=headers))
    while (await state(client))["running"] == 0:
        assert not waiting.done()
    await asyncio.sleep(0.1)  # some tokens
    waiting.cancel()
    await seconds_until_idle(client)
    (line,) = [line for line in slow.access_lines() if line["request_id"] == "left-early"]
    assert (line["status"], line["complete"]) == (499, False)
    assert line["completion_tokens"] > 0
