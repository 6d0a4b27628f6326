"""KServe's model repository API: load and unload at run time, over REST and gRPC, while others serve."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import orjson
import pytest
import tritonclient.http as triton

from aim_kserve.kserve import pb, pb_grpc
from served import Served

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "hi"}]
TRITON = Path(__file__).parent.parent / "fakes" / "triton_grpc_client.py"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """``a`` serves, ``b`` and ``slow`` (loads for 1.5 s) can be loaded, ``broken`` cannot."""
    models = {
        "a": {},
        "b": {"at_start": False, "aliases": ["second"], "engine": {"slots": 4}},
        "slow": {"at_start": False, "engine": {"load_s": 1.5}},
        "broken": {"at_start": False, "engine": {"load_error": "/models/broken: no such file or directory"}},
    }
    with Served.fake_models(models=models) as server:
        yield server


def post(server: Served, verb: str, name: str, **request: Any) -> tuple[int, Any]:
    answer = httpx.post(f"{server.url}/v2/repository/models/{name}/{verb}", timeout=30, **request)
    return answer.status_code, answer.json()


def index(server: Served, **body: Any) -> dict[str, tuple[str, str]]:
    rows = httpx.post(f"{server.url}/v2/repository/index", json=body).json()
    return {row["name"]: (row["state"], row["reason"]) for row in rows}


def chat(server: Served, model: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + CHAT, json={"model": model, "messages": ASK, **fields}, timeout=30)


def metrics_of(server: Served, model: str) -> set[str]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {line.partition("{")[0] for line in lines if f'model_name="{model}"' in line and line.startswith("aim_")}


def test_index_tells_states_and_reasons(served: Served) -> None:
    assert index(served) == {
        "a": ("READY", ""),
        **{name: ("UNAVAILABLE", "not loaded") for name in ("b", "slow", "broken")},
    }
    assert list(index(served, ready=True)) == ["a"]


def test_load_and_unload(served: Served) -> None:
    for _ in range(2):  # the second changes nothing
        assert post(served, "load", "b") == (200, {"name": "b", "load": True})
    assert index(served)["b"] == ("READY", "")
    assert chat(served, "b").json()["model"] == chat(served, "second").json()["model"] == "b"
    assert "aim_requests_total" in metrics_of(served, "b")
    for _ in range(2):
        assert post(served, "unload", "b") == (200, {"name": "b", "unload": True})
    assert index(served)["b"] == ("UNAVAILABLE", "unloaded")
    assert metrics_of(served, "b") == {"aim_model_state"}
    assert chat(served, "b").status_code == httpx.get(f"{served.url}/v2/models/second/ready").status_code == 404
    assert httpx.get(f"{served.url}/v2/health/ready").status_code == 200  # nobody waits for who was told to leave


def test_an_unknown_name_and_a_model_that_cannot_be_loaded(served: Served) -> None:
    for verb in ("load", "unload"):
        status, body = post(served, verb, "nobody")
        assert (status, "knows: a, b, slow, broken" in body["error"]) == (404, True)
    status, body = post(served, "load", "broken")
    assert (status, body) == (400, {"error": "model broken: /models/broken: no such file or directory"})
    assert index(served)["broken"] == ("UNAVAILABLE", "/models/broken: no such file or directory")
    assert chat(served, "broken").status_code == 503
    assert post(served, "unload", "broken")[0] == 200
    assert httpx.get(f"{served.url}/v2/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"content": b"[1]"}, "must be a JSON object"),
        ({"content": b'{"parameters": '}, "not valid JSON"),
        ({"json": {"parameters": {"config": "{}"}}}, "parameters.config: not taken here"),
        ({"json": {"parameters": [1]}}, "parameters: must be an object"),
        ({"json": {"model": "b"}}, "model: unknown field"),
    ],
)
def test_bodies_that_ask_for_more_are_refused(served: Served, request_: dict[str, Any], says: str) -> None:
    status, body = post(served, "load", "a", **request_)
    assert status == 400
    assert says in body["error"]
    answer = httpx.post(f"{served.url}/v2/repository/index", json={"ready": "yes"})
    assert (answer.status_code, answer.json()["error"]) == (400, "ready: must be true or false (got 'yes')")


def test_tritonclient_over_http(served: Served) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{served.http_port}") as client:
        client.load_model("b")
        assert client.is_model_ready("b")
        states = {row["name"]: row["state"] for row in client.get_model_repository_index()}
        assert states["b"] == "READY"
        client.unload_model("b")
        with pytest.raises(Exception, match="b"):
            client.load_model("nobody")


def test_kserves_and_tritons_protocol_files_over_grpc(served: Served) -> None:
    with grpc.insecure_channel(served.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="b"))
        assert (answer.model_name, answer.isLoaded) == ("b", True)
        assert stub.ModelReady(pb.ModelReadyRequest(name="b")).ready
        assert stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="b")).isUnloaded
        for name, code in (("nobody", grpc.StatusCode.NOT_FOUND), ("broken", grpc.StatusCode.INVALID_ARGUMENT)):
            with pytest.raises(grpc.RpcError) as caught:
                stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name))
            assert caught.value.code() == code
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="broken"))
    calls = [
        {"ask": "load_model", "arguments": ["b"]},
        {"ask": "is_model_ready", "arguments": ["b"]},
        {"ask": "unload_model", "arguments": ["b"]},
        {"ask": "load_model", "arguments": ["nobody"]},
    ]
    lines = b"\n".join(orjson.dumps(call) for call in calls)
    command = [sys.executable, str(TRITON), served.grpc_url]
    told = subprocess.run(command, input=lines, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    loaded, ready, unloaded, unknown = map(orjson.loads, told)
    assert (loaded, ready, unloaded) == (None, True, None)
    assert unknown["status"] == "StatusCode.NOT_FOUND"


def test_loads_of_one_name_are_one_load(served: Served) -> None:
    with ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(post, served, "load", "slow") for _ in range(8)]
        while index(served)["slow"][0] != "LOADING":
            assert not loads[0].done()
        assert chat(served, "slow").status_code == 503
        assert int(chat(served, "slow").headers["retry-after"]) >= 1
        unload = pool.submit(post, served, "unload", "slow")  # waits for its turn, behind the load
        assert [load.result()[0] for load in loads] == [200] * 8
        assert unload.result()[0] == 200
    assert index(served)["slow"][0] in ("UNAVAILABLE", "READY")  # whichever load came last
    post(served, "unload", "slow")


def test_a_load_goes_on_when_its_client_leaves(served: Served) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v2/repository/models/slow/load", timeout=0.1)
    served.wait_status("/v2/models/slow/ready", 200)
    post(served, "unload", "slow")


def test_changes_that_wait_leave_with_their_clients_and_are_not_endless() -> None:
    models = {"a": {}, "slow": {"at_start": False, "engine": {"load_s": 2.0}}}
    with Served.fake_models(models=models) as server, ThreadPoolExecutor(40) as pool:
        begun = pool.submit(post, server, "load", "slow")
        while index(server)["slow"][0] != "LOADING":
            assert not begun.done()
        for number in range(10):  # hundreds of these would be minutes of loading, for nobody
            url = f"{server.url}/v2/repository/models/slow/{('unload', 'load')[number % 2]}"
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, timeout=httpx.Timeout(5, read=0.02))
        assert begun.result()[0] == 200
        assert post(server, "load", "slow") == (200, {"name": "slow", "load": True})  # at once: nothing was before it
        assert [line["audit"] for line in server.audit_lines() if line["model"] == "slow"] == ["load"]
        post(server, "unload", "slow")
        stay = [pool.submit(post, server, "load", "slow") for _ in range(20)]
        answers = [each.result() for each in stay]
        refused = [body["error"] for status, body in answers if status == 429]
        assert [status for status, _ in answers].count(200) == 17  # one at work, sixteen waiting
        assert set(refused) == {"model slow: 16 changes of it wait for their turn: ask again later"}


@contextmanager
def traffic(server: Served, model: str) -> Iterator[list[int]]:
    """Statuses of requests to ``model``, sent all the while."""
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not stop.is_set():
                body = {"model": model, "messages": ASK, "max_tokens": 3}
                statuses.append(client.post(CHAT, json=body).status_code)

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(ask) for _ in range(4)]
        try:
            yield statuses
        finally:
            stop.set()
            for worker in workers:
                worker.result()


def test_loads_and_unloads_cost_the_others_nothing(served: Served) -> None:
    with traffic(served, "a") as statuses:
        for _ in range(5):
            assert post(served, "load", "b")[0] == 200
            assert post(served, "unload", "b")[0] == 200
        assert post(served, "load", "broken")[0] == 400
        assert post(served, "unload", "broken")[0] == 200
    assert len(statuses) > 20
    assert set(statuses) == {200}


def test_an_unload_lets_requests_in_flight_finish(served: Served) -> None:
    post(served, "load", "b")
    body = {"model": "b", "messages": ASK, "stream": True, "max_tokens": 150, "fake": {"token_s": 0.02}}
    instances = {"instances": ["x"] * 40, "parameters": {"max_tokens": 20, "fake": {"token_s": 0.01}}}
    with ThreadPoolExecutor(4) as pool, httpx.stream("POST", served.url + CHAT, json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        # More prompts than run at once: the last ones wait for their turn when the unload comes.
        batch = pool.submit(httpx.post, f"{served.url}/v1/models/b:predict", json=instances, timeout=30)
        while httpx.get(f"{served.url}/load").json()["server_load"] < 10:
            assert not batch.done()
        unload = pool.submit(post, served, "unload", "b")
        while index(served)["b"][0] != "UNLOADING":
            assert not unload.done()
        late = chat(served, "b")
        assert (late.status_code, "shutting down" in late.json()["error"]["message"]) == (503, True)
        assert sum('"content":"' in line for line in lines) == 150
        assert unload.result()[0] == 200
        assert (batch.result().status_code, len(batch.result().json()["predictions"])) == (200, 40)


def test_what_does_not_fit_is_refused_with_the_shortfall_and_changes_nothing() -> None:
    models = {"a": {}, "b": {"at_start": False}}
    with Served.fake_models(models=models, budget=1) as server:
        before = index(server)
        status, body = post(server, "load", "b")
        assert (status, body) == (
            409,
            {"error": "model b: needs 1.0 GiB, 0.0 GiB are free: 1.0 GiB short"},
        )
        assert index(server) == before
        assert post(server, "unload", "a")[0] == 200
        assert post(server, "load", "b")[0] == 200
        assert index(server)["a"] == ("UNAVAILABLE", "unloaded")
        server.terminate()
        assert server.exit_code(10) == 0
        assert "Traceback" not in server.stderr()


def test_idle_models_of_a_lower_priority_make_room() -> None:
    models = {
        "low": {"priority": "low"},
        "also": {"priority": "medium"},
        "high": {"priority": "high", "at_start": False},
        "equal": {"priority": "low", "at_start": False},
    }
    with Served.fake_models(models=models, budget=2, eviction="idle", cooldown_s=2) as server:
        assert post(server, "load", "high")[0] == 409  # all have just been loaded
        time.sleep(2.2)
        assert post(server, "load", "equal")[0] == 409  # nobody is of a lower priority
        busy = {"model": "low", "messages": ASK, "stream": True, "max_tokens": 100_000, "fake": {"token_s": 0.05}}
        with httpx.stream("POST", server.url + CHAT, json=busy) as stream:
            next(stream.iter_lines())
            assert post(server, "load", "high")[0] == 200  # the lowest is busy: the other one leaves
        assert index(server)["also"] == ("UNAVAILABLE", "unloaded to make room for high")
        assert index(server)["low"][0] == "READY"
        told = chat(server, "also")
        assert (told.status_code, told.json()["error"]["code"]) == (503, "model_not_loaded")
        assert post(server, "load", "also")[0] == 409  # `low` has just been used: no flapping


def test_the_only_model_stays() -> None:
    with Served.fake_models(models={"a": {}}) as server:
        status, body = post(server, "unload", "a")
        assert (status, "lives as long as this process" in body["error"]) == (501, True)
        assert index(server) == {"a": ("READY", "")}
