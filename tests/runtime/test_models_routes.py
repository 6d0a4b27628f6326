"""Several models behind one endpoint: every protocol finds each by its name, and tells what there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
import tritonclient.http as triton
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

from aim_kserve.kserve import pb, pb_grpc
from served import Served

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def two() -> Iterator[Served]:
    """``a`` (also called ``first``, with the adapter ``polite``) and ``b``; ``c`` is known and not loaded."""
    models = {
        "a": {"aliases": ["first"], "engine": {"adapters": ["polite"], "max_model_len": 100}},
        "b": {"engine": {"max_model_len": 200}},
        "c": {"at_start": False},
    }
    with Served.fake_models(models=models) as server:
        yield server


@pytest.fixture(scope="module")
def client(two: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{two.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    ("asked", "answers"), [("a", "a"), ("b", "b"), ("first", "a"), ("polite", "a")], ids=["a", "b", "alias", "adapter"]
)
def test_openai_client_by_name(client: openai.OpenAI, asked: str, answers: str) -> None:
    answer = client.chat.completions.create(model=asked, messages=ASK, max_tokens=2)
    assert answer.model == answers
    stream = client.completions.create(model=asked, prompt="x", max_tokens=2, stream=True)
    assert {chunk.model for chunk in stream} == {answers}


def test_openai_client_lists_all(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["a", "first", "polite", "b"]
    assert client.models.retrieve("b").model_dump()["max_model_len"] == 200
    assert client.models.retrieve("first").model_dump()["root"] == "a"
    assert client.models.retrieve("polite").model_dump()["parent"] == "a"


def test_kserves_v1_lists_all(two: Served) -> None:
    assert httpx.get(f"{two.url}/v1/models").json()["models"] == ["a", "b"]
    assert httpx.get(f"{two.url}/v2/models").json()["models"] == ["a", "first", "polite", "b"]


@pytest.mark.parametrize("asked", ["nobody", "c"])
def test_a_model_that_is_not_served_is_told_with_what_is(client: openai.OpenAI, two: Served, asked: str) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has: a, first, polite, b") as caught:
        client.chat.completions.create(model=asked, messages=ASK)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    loads = "POST /v2/repository/models/c/load" in caught.value.message
    assert loads == (asked == "c")
    for path in (f"/v1/models/{asked}", f"/v2/models/{asked}/ready", f"/v2/models/{asked}"):
        answer = httpx.get(two.url + path)
        assert answer.status_code == 404, path
        assert "this server has: a, first, polite, b" in answer.text


def test_a_body_that_names_no_model_is_told_what_there_is(two: Served) -> None:
    answer = httpx.post(two.url + CHAT, json={"messages": ASK})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_missing")
    assert "this server has 2 models: give one of a, first, polite, b" in error["message"]


@pytest.mark.parametrize("model", [5, ["a"], {"a": 1}, ""])
def test_a_model_that_is_no_name(two: Served, model: Any) -> None:
    answer = httpx.post(two.url + CHAT, json={"model": model, "messages": ASK})
    assert answer.status_code == (404 if model == "" else 400)
    assert answer.json()["error"]["param"] == "model"


def test_an_operation_that_a_model_lacks_names_the_model(two: Served) -> None:
    answer = httpx.post(f"{two.url}/v1/embeddings", json={"model": "b", "input": "x"})
    assert answer.status_code == 400
    assert "model b does not support embeddings" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["a", "b", "first", "polite"])
async def test_kserves_clients_by_name(two: Served, name: str) -> None:
    request = InferRequest(name, [InferInput("prompt", [1], "BYTES", ["x"])], parameters={"max_tokens": 2})
    rest, v1 = (InferenceRESTClient(RESTConfig(protocol=protocol)) for protocol in ("v2", "v1"))
    answer = await rest.infer(two.url, request, model_name=name)
    assert (answer.model_name, answer.outputs[0].data) == (name, ["the quick"])
    assert await rest.is_model_ready(two.url, model_name=name)
    assert len((await v1.infer(two.url, {"instances": ["x"]}, model_name=name))["predictions"]) == 1
    over_grpc = InferenceGRPCClient(two.grpc_url)
    answer = await over_grpc.infer(InferRequest(name, [InferInput("prompt", [1], "BYTES", ["x"])]))
    assert answer.model_name == name
    for each in (rest, v1, over_grpc):
        await each.close()


@pytest.mark.parametrize("name", ["a", "b"])
def test_tritonclient_by_name(two: Served, name: str) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{two.http_port}") as client:
        assert client.is_model_ready(name)
        assert client.get_model_metadata(name)["name"] == name
        prompts = triton.InferInput("prompt", [1], "BYTES")
        prompts.set_data_from_numpy(np.array(["x"], dtype=object))
        assert client.infer(name, [prompts], parameters={"max_tokens": 2}).as_numpy("text")[0] == b"the quick"


def test_grpc_tells_unknown_names(two: Served) -> None:
    with grpc.insecure_channel(two.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(pb.ServerReadyRequest()).ready
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelReady(pb.ModelReadyRequest(name="nobody"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert "this server has: a, first, polite, b" in caught.value.details()


def test_requests_are_counted_by_model(two: Served) -> None:
    for name in ("a", "b", "b"):
        httpx.post(f"{two.url}/v1/tokenize", json={"model": name, "prompt": "x"})
    text = httpx.get(f"{two.url}/metrics").text
    counts = [line for line in text.splitlines() if line.startswith("aim_requests_total") and '"tokenize"' in line]
    assert {line.rpartition(" ")[2] for line in counts if 'model_name="a"' in line} == {"1.0"}
    assert {line.rpartition(" ")[2] for line in counts if 'model_name="b"' in line} == {"2.0"}


def test_versions_and_load(two: Served) -> None:
    version = httpx.get(f"{two.url}/version").json()
    assert version["models"] == {name: {"version": "1.2.3", "engine": "fake"} for name in "ab"}
    body = {"model": "b", "messages": ASK, "stream": True, "max_tokens": 1000, "fake": {"token_s": 0.01}}
    with httpx.stream("POST", two.url + CHAT, json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert httpx.get(f"{two.url}/load").json() == {"server_load": 1}


def ready(server: Served) -> dict[str, int]:
    paths = ("/health", "/v2/health/ready", "/v2/health/live", "/", "/v2/models/a/ready", "/v2/models/b/ready")
    return {path: httpx.get(server.url + path).status_code for path in paths}


def test_one_that_cannot_be_loaded_leaves_the_others_serving() -> None:
    models = {"a": {"engine": {"load_error": "/models/a: bad magic"}}, "b": {}}
    with Served.fake_models(wait=False, models=models) as server:
        server.wait_status("/v2/models/b/ready", 200)
        assert ready(server) == {
            **{"/health": 503, "/v2/health/ready": 503, "/v2/health/live": 200, "/": 200},
            **{"/v2/models/a/ready": 503, "/v2/models/b/ready": 200},
        }
        answer = httpx.post(server.url + CHAT, json={"model": "a", "messages": ASK})
        assert answer.status_code == 503
        assert "model a could not be loaded: /models/a: bad magic" in answer.json()["error"]["message"]
        assert httpx.post(server.url + CHAT, json={"model": "b", "messages": ASK}).status_code == 200
        server.terminate()
        assert server.exit_code(10) == 0


def test_none_that_can_be_loaded_ends_the_process() -> None:
    models = {name: {"engine": {"load_error": f"/models/{name}: bad magic"}} for name in "ab"}
    with Served.fake_models(wait=False, models=models) as server:
        assert server.exit_code(20) == 1
        assert server.stderr().splitlines()[-2:] == [
            "error: model a: /models/a: bad magic",
            "error: model b: /models/b: bad magic",
        ]


def test_one_that_dies_among_others_is_no_reason_to_end_the_process() -> None:
    with Served.fake_models(models={"a": {}, "b": {}}) as server:
        httpx.post(server.url + CHAT, json={"model": "a", "messages": ASK, "fake": {"die": True}})
        assert ready(server) == {
            **{"/health": 503, "/v2/health/ready": 503, "/v2/health/live": 200, "/": 200},
            **{"/v2/models/a/ready": 503, "/v2/models/b/ready": 200},
        }
        assert httpx.post(server.url + CHAT, json={"model": "b", "messages": ASK}).status_code == 200
        httpx.post(server.url + CHAT, json={"model": "b", "messages": ASK, "fake": {"die": True}})
        assert ready(server)["/v2/health/live"] == ready(server)["/"] == 503


def test_all_drain_at_once_and_within_the_grace_period() -> None:
    models = {"a": {"engine": {"close_s": 0.2}}, "b": {"engine": {"close_s": 0.2}}}
    with Served.fake_models("--grace_period", "20", models=models) as server:
        body = {"messages": ASK, "stream": True, "max_tokens": 60, "fake": {"token_s": 0.01}}
        with (
            httpx.stream("POST", server.url + CHAT, json={**body, "model": "a"}) as one,
            httpx.stream("POST", server.url + CHAT, json={**body, "model": "b"}) as other,
        ):
            first = one.iter_lines(), other.iter_lines()
            for lines in first:
                next(lines)
            server.terminate()
            for lines in first:
                assert sum('"content":"' in line for line in lines) == 60
        assert server.exit_code(10) == 0


def test_names_with_slashes_and_in_any_script_are_found_on_every_route() -> None:
    models = {"org/model": {"aliases": ["org/also"]}, "модель": {}, "off": {"at_start": False}}
    variants = {"assistant": {"модель": 1}}
    with Served.fake_models(models=models, variants=variants) as server:
        for name in ("org/model", "org/also", "модель", "assistant"):
            assert httpx.get(f"{server.url}/v2/models/{name}/ready").json()["ready"], name
            assert httpx.get(f"{server.url}/v2/models/{name}").json()["name"] == name
            assert httpx.get(f"{server.url}/v1/models/{name}").json()["ready"]
            assert httpx.get(f"{server.url}/readyz/{name}").text == "ok"
            v1 = httpx.post(f"{server.url}/v1/models/{name}:predict", json={"instances": ["x"]})
            assert (v1.status_code, len(v1.json()["predictions"])) == (200, 1)
            tensor = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["x"]}
            v2 = httpx.post(f"{server.url}/v2/models/{name}/infer", json={"inputs": [tensor]})
            assert (v2.status_code, v2.json()["model_name"]) == (200, name)
            chat = httpx.post(f"{server.url}{CHAT}", json={"model": name, "messages": ASK})
            told = [dict(answer.headers.raw).get(b"x-model-variant") for answer in (v1, v2, chat)]
            assert told == [("модель".encode() if name == "assistant" else None)] * 3
        for path in ("/readyz/off", "/readyz/org", "/v2/models/org/ready", "/v1/models/org", "/v2/models/org/model/x"):
            assert httpx.get(server.url + path).status_code == 404, path
        assert httpx.post(f"{server.url}/v2/repository/models/org/model/unload").status_code == 200
        assert httpx.get(f"{server.url}/v2/models/org/model/ready").status_code == 404
        assert httpx.post(f"{server.url}/v2/repository/models/модель/unload").status_code == 200
        assert httpx.get(f"{server.url}/readyz/assistant").status_code == 503
        assert "Traceback" not in server.stderr()
