"""A detector that fails: nothing passes, or what the policy says; and a guard that is not there yet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from aim_guardrail.detectors.base import Finding
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import parse_policy
from aim_guardrail.proxy import Proxy
from aim_guardrail.text import Text
from aim_guardrail.upstream import Upstream
from aim_kserve.access import AccessLog
from aim_kserve.errors import Unavailable
from fake_predictor import FakePredictor
from guarded import ask, events, orders, said

CHAT = "/v1/chat/completions"


class Fragile:
    """A detector of secrets that breaks on the word "boom" and finds nothing."""

    family = "secrets"
    labels = frozenset({"SECRET"})

    def may_find(self, scan: str) -> bool:
        return True

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        if "boom" in text.scan[since:]:
            raise ZeroDivisionError
        return []


@dataclass
class Model:
    """What the proxy asks of the transformer's model."""

    guard: Guard
    metrics: Metrics
    predictor: Any

    def generation(self) -> AbstractContextManager[None]:
        return nullcontext()

    def screening(self, _: None, context: RequestContext) -> Screening:
        return Screening(self.guard, self.metrics, context)


@dataclass
class Over:
    http: Upstream
    only_grpc: bool = False


class Loading:
    predictor = Over(http=None)  # type: ignore[arg-type]

    def generation(self) -> None:
        raise Unavailable("the guardrail is still loading: ask again")


async def nobody(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("not KServe's")


async def serve(guard: Guard, predictor: FakePredictor) -> AsyncIterator[tuple[httpx.AsyncClient, CollectorRegistry]]:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    upstream = Upstream(predictor.host, metrics)
    app = AccessLog(Proxy(nobody, Model(guard, metrics, Over(upstream)), metrics, 2**20), enabled=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        yield client, registry
    upstream.close()


def guard_of(on_error: str) -> Guard:
    rules = "prompt: &r [{type: secrets, action: block}]\nanswer: *r\n"
    return Guard(parse_policy(f"version: 1\nname: p\non_error: {on_error}\n{rules}", "p"), [Fragile()])


@pytest.fixture
async def closed(predictor: FakePredictor) -> AsyncIterator[tuple[httpx.AsyncClient, CollectorRegistry]]:
    async for served in serve(guard_of("closed"), predictor):
        yield served


@pytest.fixture
async def opened(predictor: FakePredictor) -> AsyncIterator[tuple[httpx.AsyncClient, CollectorRegistry]]:
    async for served in serve(guard_of("open"), predictor):
        yield served


Served = tuple[httpx.AsyncClient, CollectorRegistry]


@pytest.mark.parametrize("told", [{}, {"say": "boom"}])
async def test_closed(closed: Served, predictor: FakePredictor, told: dict[str, str]) -> None:
    client, registry = closed
    seen = len(predictor.seen)
    answer = await client.post(CHAT, json=ask("well" if told else "boom"), headers=orders(**told))
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "guardrail_failed"
    assert "secrets" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
    assert "boom" not in answer.text
    assert len(predictor.seen) == seen + bool(told)
    assert registry.get_sample_value("guardrail_errors_total", {"detector": "secrets", "reason": "closed"}) == 1
    direction = "answer" if told else "prompt"
    labels = {"direction": direction, "use_case": "chat", "decision": "error"}
    assert registry.get_sample_value("guardrail_requests_total", labels) == 1
    assert registry.get_sample_value("guardrail_upstream_connections") == 0


async def test_closed_in_a_stream(closed: Served) -> None:
    client, registry = closed
    answer = await client.post(CHAT, json=ask("hi", stream=True), headers=orders(say="all is well then boom again"))
    got = events(answer)
    assert said(got[:-2]) == "all is well then "
    assert got[-2]["error"]["code"] == "guardrail_failed"
    assert got[-1] == "[DONE]"
    assert "boom" not in answer.text
    assert registry.get_sample_value("guardrail_upstream_connections") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_open(opened: Served, stream: bool) -> None:
    client, registry = opened
    answer = await client.post(CHAT, json=ask("boom", stream=stream))
    assert answer.status_code == 200
    assert answer.headers["x-guardrail-degraded"] == "secrets"
    assert "boom" in answer.text
    assert registry.get_sample_value("guardrail_errors_total", {"detector": "secrets", "reason": "degraded"}) == 2


async def test_before_the_guard_is_loaded() -> None:
    app = AccessLog(Proxy(nobody, Loading(), Metrics(CollectorRegistry()), 2**20), enabled=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        answer = await client.post(CHAT, json=ask("hi"))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        answer = await client.post("/v1/models/m:predict", json={"instances": ["hi"]})
        assert answer.json() == {"error": "the guardrail is still loading: ask again"}


async def test_an_unforeseen_error_is_told_without_its_text(
    closed: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a secret value")

    client, _ = closed
    with monkeypatch.context() as patch:
        patch.setattr("aim_guardrail.streams.chat.ChatStream.take", broken)
        got = events(await client.post(CHAT, json=ask("hi", stream=True)))
    assert got[0]["error"]["message"] == "internal error: the server's log has the cause, by x-request-id"
    assert got[1] == "[DONE]"
    monkeypatch.setattr("aim_guardrail.pipeline.screening.Screening.body", broken)
    answer = await client.post(CHAT, content=orjson.dumps(ask("hi")))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "a secret value" in caplog.text
