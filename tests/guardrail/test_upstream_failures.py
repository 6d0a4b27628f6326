"""A predictor that is down, slow, silent, rude or gone in the middle; clients that leave. The transformer stays."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from fake_predictor import FakePredictor
from guarded import ask, events, eventually, guardrail, metric, orders, said
from ports import free_ports
from served import Served

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def port() -> int:
    """Where the predictor of this file comes and goes."""
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def impatient(port: int) -> Iterator[Served]:
    """A transformer that waits a second, started with its predictor down, ready only while that is ready."""
    flags = ["--predictor_request_timeout_seconds", "1", "--predictor_connect_timeout_seconds", "0.5"]
    flags += ["--enable_predictor_health_check", "--predictor_health_cache_seconds", "0.2"]
    with guardrail(f"127.0.0.1:{port}", *flags, wait=False) as server:
        server.wait_status("/v2/health/live", 200)
        yield server


@pytest.fixture
def there(port: int) -> Iterator[FakePredictor]:
    with FakePredictor(port) as predictor:
        yield predictor


def in_use(server: Served) -> float:
    return metric(server, "guardrail_upstream_connections")


def test_down_then_up_then_down(impatient: Served, port: int) -> None:
    with httpx.Client(base_url=impatient.url, timeout=20) as client:
        # Readiness is asked first: its route waits for the guard to be loaded, the chat's answer tells why.
        for _ in range(2):
            assert eventually(lambda: refused(client)["code"] == "predictor_unreachable", 60)
            assert client.get("/v2/models/m/ready").status_code == 503
            assert client.get("/v2/health/ready").status_code == 503
            assert client.get("/v2/health/live").status_code == 200
            assert client.get("/v1/models/m").status_code == 503
            with FakePredictor(port) as predictor:
                for _ in range(3):  # kept connections, which are stale in the next round
                    assert client.post(CHAT, json=ask("hi")).status_code == 200
                assert eventually(lambda: client.get("/v2/models/m/ready").status_code == 200)
                assert client.get("/v1/models/m").json()["ready"] is True
                predictor.ready = False
                assert eventually(lambda: client.get("/v2/models/m/ready").status_code == 503)
    assert in_use(impatient) == 0


def refused(client: httpx.Client) -> dict[str, str]:
    """The error of a chat that is refused at once, to be tried again."""
    asked = time.monotonic()
    answer = client.post(CHAT, json=ask("hi"))
    assert time.monotonic() - asked < 2  # the bound on the answer, not a benchmark
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "service_unavailable"
    error: dict[str, str] = answer.json()["error"]
    return error


def test_a_restart_costs_no_request(impatient: Served, port: int) -> None:
    """The connection kept from before the restart is dead: a fresh one is tried before anybody is told."""
    for _ in range(3):
        with FakePredictor(port):
            assert httpx.post(impatient.url + CHAT, json=ask("hi")).status_code == 200


def test_health_is_asked_seldom(impatient: Served, there: FakePredictor) -> None:
    with httpx.Client(base_url=impatient.url) as client:
        assert eventually(lambda: client.get("/v2/models/m/ready").status_code == 200)
        started = time.monotonic()
        for _ in range(20):
            client.get("/v2/models/m/ready")
        elapsed = time.monotonic() - started
    asked = [item for item in there.seen if item["path"] == "/v1/models/m"]
    assert len(asked) <= 3 + elapsed / 0.2


def test_a_predictor_that_swallows_connections(port: int, impatient: Served) -> None:
    """Nothing accepts: the backlog is full, packets are dropped, as behind a NetworkPolicy."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            with httpx.Client(base_url=impatient.url, timeout=20) as client:
                assert refused(client)["code"] == "predictor_unreachable"
        finally:
            for filler in fillers:
                filler.close()
    assert in_use(impatient) == 0


@pytest.mark.parametrize(
    ("told", "status", "code"),
    [
        ({"hang_after": -1}, 504, "predictor_timeout"),
        ({"hang_after": 20}, 504, "predictor_timeout"),
        ({"drop_after": 0}, 503, "predictor_broken"),
        ({"drop_after": 20}, 502, "predictor_broken"),
    ],
)
def test_unary_faults(impatient: Served, there: FakePredictor, told: dict, status: int, code: str) -> None:
    answer = httpx.post(impatient.url + CHAT, json=ask("hi"), headers=orders(**told), timeout=20)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert "retry-after" in answer.headers or status == 504
    assert httpx.post(impatient.url + CHAT, json=ask("hi")).status_code == 200
    assert in_use(impatient) == 0
    assert eventually(lambda: there.open == 0)


@pytest.mark.parametrize(
    ("told", "code"), [({"drop_after": 700}, "predictor_broken"), ({"hang_after": 700}, "predictor_timeout")]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_streams_that_break_say_so(impatient: Served, there: FakePredictor, told: dict, code: str, path: str) -> None:
    body = ask("hi", stream=True) if path == CHAT else {"model": "m", "prompt": "hi", "stream": True}
    text = "the number is 4111 1111 1111 1111 and so on and on"
    answer = httpx.post(impatient.url + path, json=body, headers=orders(say=text, **told), timeout=20)
    assert answer.status_code == 200
    got = events(answer)
    assert got[-1] == "[DONE]"
    assert got[-2]["error"]["code"] == code
    assert said(got[:-2]).startswith("the ")
    assert "4111" not in answer.text
    assert in_use(impatient) == 0


def test_a_stream_that_just_ends_is_a_broken_one(impatient: Served, there: FakePredictor) -> None:
    raw = 'data: {"choices":[{"index":0,"delta":{"content":"half 4111 1111"}}]}\n\n'
    got = events(httpx.post(impatient.url + CHAT, json=ask("hi", stream=True), headers=orders(raw=raw)))
    assert got[-2]["error"]["code"] == "predictor_broken"
    assert "4111" not in str(got)


def test_a_responses_stream_that_breaks(impatient: Served, there: FakePredictor) -> None:
    told = orders(say="the number of things", drop_after=1500)
    with openai.OpenAI(base_url=impatient.url + "/v1", api_key="k", max_retries=0) as client:
        seen = list(client.responses.create(model="m", input="x", stream=True, extra_headers=told))
    assert seen[-1].type == "error"
    assert seen[-1].code == "predictor_broken"
    assert [event.sequence_number for event in seen] == list(range(len(seen)))


def test_an_endless_event_is_cut_off(impatient: Served, there: FakePredictor) -> None:
    told = orders(raw="data: x", times=2**21)
    answer = httpx.post(impatient.url + CHAT, json=ask("hi", stream=True), headers=told, timeout=20)
    assert events(answer)[0]["error"]["type"] == "upstream_error"
    assert len(answer.content) < 1000


async def test_two_hundred_streams_broken_off_then_fifty_answered(
    transformer: Served, predictor: FakePredictor
) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    told = orders(say="word " * 200, token_s=0.02)
    async with httpx.AsyncClient(base_url=transformer.url, timeout=60, limits=limits) as client:

        async def break_off(number: int) -> None:
            async with client.stream("POST", CHAT, json=ask("hi", stream=True), headers=told) as response:
                assert response.status_code == 200
                read = 0
                async for _ in response.aiter_lines():
                    read += 1
                    if read > number % 4:
                        return

        for start in range(0, 200, 20):
            await asyncio.gather(*(break_off(start + i) for i in range(20)))
        assert await asyncio.to_thread(eventually, lambda: predictor.open == 0)
        assert await asyncio.to_thread(eventually, lambda: in_use(transformer) == 0)
        answers = await asyncio.gather(*(client.post(CHAT, json=ask("hello there")) for _ in range(50)))
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == ["hello there"] * 50
    assert in_use(transformer) == 0
    left = [line for line in transformer.access_lines() if line.get("complete") is False]
    assert len(left) >= 200


async def test_a_client_that_leaves_before_the_answer(transformer: Served, predictor: FakePredictor) -> None:
    """Unary: the predictor is told at once, too."""
    async with httpx.AsyncClient(base_url=transformer.url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask("hi"), headers=orders(hang_after=-1)))
        assert await asyncio.to_thread(eventually, lambda: predictor.open == 1)
        asking.cancel()
        assert await asyncio.to_thread(eventually, lambda: predictor.open == 0)
    assert await asyncio.to_thread(eventually, lambda: in_use(transformer) == 0)
    assert await asyncio.to_thread(eventually, lambda: transformer.access_lines()[-1]["status"] == 499)


def test_connections_are_kept(transformer: Served, predictor: FakePredictor) -> None:
    before = len(predictor.connections)
    with httpx.Client(base_url=transformer.url) as client:
        for _ in range(20):
            client.post(CHAT, json=ask("hi"))
            client.post(CHAT, json=ask("hi", stream=True))
    assert len(predictor.connections) <= before + 2
