"""KServe's own routes with a model that misbehaves, in process: what a V1 or V2 client is told."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from aim_kserve.access import AccessLog
from aim_kserve.dataplane import FixedRepository, TruthfulDataPlane
from aim_kserve.errors import BadRequest, ContentBlocked, Overloaded
from aim_kserve.kserve import Model, ModelRepository
from aim_kserve.rest import Tolerant, install


class Troubled(Model):  # type: ignore[misc]
    """Answers with ``result``, or raises it."""

    result: Any = None
    lives = True

    def __init__(self) -> None:
        super().__init__("m")
        self.ready = True

    def alive(self) -> bool:
        return self.lives

    async def predict(self, payload: Any, headers: Any = None) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_what_is_lazy_comes_when_it_is_asked_for() -> None:
    code = (
        "import sys, aim_kserve.kserve as k; assert not {'kubernetes', 'pandas'} & set(sys.modules);"
        "import pandas; assert pandas.DataFrame({'a': [1]}).shape == (1, 1);"
        "import kserve; assert kserve.KServeClient and kserve.Model is k.Model"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def model() -> Troubled:
    return Troubled()


@pytest.fixture
async def client(model: Troubled) -> AsyncIterator[httpx.AsyncClient]:
    registry = ModelRepository()
    registry.update(model)
    dataplane, repository = TruthfulDataPlane(registry), FixedRepository(registry)
    app = AccessLog(Tolerant(install(FastAPI(), dataplane, repository, [], max_body_bytes=100)), enabled=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (BadRequest("prompt: too odd"), 400, None),
        (ContentBlocked("blocked: pii"), 400, None),
        (Overloaded("full", retry_after_s=3), 429, "3"),
        (ZeroDivisionError("secret"), 500, None),
        (NotImplementedError("not today"), 501, None),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models/m:predict", "/v2/models/m/infer"])
async def test_errors_are_kserves_shape(
    client: httpx.AsyncClient, model: Troubled, path: str, error: Exception, status: int, retry: str | None
) -> None:
    model.result = error
    body = {"instances": ["x"], "inputs": [{"name": "p", "shape": [1], "datatype": "BYTES", "data": ["x"]}]}
    answer = await client.post(path, json=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert isinstance(answer.json()["error"], str)
    assert "secret" not in answer.text
    assert answer.headers.get("retry-after") == retry


async def test_readiness_and_life_are_the_models(client: httpx.AsyncClient, model: Troubled) -> None:
    paths = ("/v2/health/ready", "/v2/health/live", "/v2/models/m/ready", "/v1/models/m")

    async def statuses() -> list[int]:
        return [(await client.get(path)).status_code for path in paths]

    assert await statuses() == [200, 200, 200, 200]
    model.ready = False
    assert await statuses() == [503, 200, 503, 503]
    model.lives = False
    assert await statuses() == [503, 503, 503, 503]


async def test_the_root_says_whether_the_server_lives(client: httpx.AsyncClient, model: Troubled) -> None:
    assert (await client.get("/")).json() == {"status": "alive"}
    model.ready = False
    assert (await client.get("/")).status_code == 200
    model.lives = False
    dead = await client.get("/")
    assert (dead.status_code, dead.json()) == (503, {"status": "model m has died"})


async def test_the_repository_is_fixed(client: httpx.AsyncClient, model: Troubled) -> None:
    async def post(verb: str, name: str = "m") -> tuple[int, Any]:
        answer = await client.post(f"/v2/repository/models/{name}/{verb}")
        return answer.status_code, answer.json()

    assert await post("load") == (200, {"name": "m", "load": True})
    assert (await post("unload"))[0] == 501
    assert (await post("load", "other"))[0] == (await post("unload", "other"))[0] == 404
    model.ready = False
    status, body = await post("load")
    assert (status, "not ready" in body["error"]) == (503, True)
    assert (await client.get("/v2/models/m/ready")).status_code == 503


async def test_bodies_are_bounded_and_routes_named(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/models/m:predict", content=b" " * 101)
    assert (answer.status_code, "100 bytes" in answer.json()["error"]) == (413, True)
    for method, path in (("GET", "/v3/x"), ("POST", "/v2/models/m/ready"), ("DELETE", "/v1/models/m:predict")):
        answer = await client.request(method, path)
        assert answer.status_code in (404, 405)
        assert f"no such route: {method} {path}" in answer.text


async def test_a_predict_that_streams_is_answered(client: httpx.AsyncClient, model: Troubled) -> None:
    """Starlette asks a stream's connection again and again whether its client has left."""

    async def tokens() -> AsyncIterator[bytes]:
        for token in (b"a", b"b", b"c"):
            await asyncio.sleep(0.01)
            yield token

    model.result = tokens()
    answer = await asyncio.wait_for(client.post("/v1/models/m:predict", json={"instances": ["x"]}), 10)
    assert (answer.status_code, answer.content) == (200, b"abc")


async def test_versions_are_not_served(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2/models/m/versions/1/ready")).status_code == 501


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"content-type": "application/cloudevents+json"}, b"[1]"),
        (
            {"content-type": "application/json"},
            b'{"time": 1, "type": "t", "source": "s", "id": "1", "specversion": "1.0"}',
        ),
        ({"content-type": "application/json", "ce-contenttype": "application/avro"}, b"[1]"),
        ({"content-type": "application/json"}, b"\xff"),
    ],
)
async def test_what_only_says_it_is_a_cloud_event(
    client: httpx.AsyncClient, model: Troubled, headers: dict[str, str], body: bytes
) -> None:
    model.result = BadRequest("what the model was given is odd")
    event = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "s", "ce-type": "t"}
    for more in ({}, event):
        answer = await client.post("/v1/models/m:predict", content=body, headers={**headers, **more})
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    "path",
    [
        *("/v1%2Fmodels", "/v1/models%2fm", "/v1/m%6Fdels/m", "/v1/models/m%3Apredict", "/v1/models/%6d:predict"),
        *("/v2%2Fhealth/ready", "/v2/models/m%2Finfer", "/v2/models/%6D/infer", "/%6Detrics", "/v2/%2e%2e/v2/models"),
    ],
)
async def test_a_path_is_served_in_one_spelling(client: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "POST"):
        answer = await client.request(method, path, json={"instances": ["x"]} if method == "POST" else None)
        assert answer.status_code == 404
        assert f"no such route: {method} {path}" in answer.text


async def test_a_name_may_need_its_percent_signs(client: httpx.AsyncClient, model: Troubled) -> None:
    answer = await client.get("/v2/models/a%20model%C3%A9%25/ready")
    assert "a model\u00e9%" in answer.json()["error"]
