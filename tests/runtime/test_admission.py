"""Service levels of real requests: the real server over the fake engine, by the clients that people use."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from aim_kserve.identity import keys as key_file
from aim_kserve.kserve import pb, pb_grpc
from aim_kserve.settings import SettingsError
from aim_profile.nodes.emulated import emulate, export_node
from aim_runtime.dry_run import dry_run
from aim_runtime.settings import RuntimeSettings
from model_directory import write_model
from served import Served

Json = dict[str, Any]
LOW = {"x-qos-priority": "low"}
#: Ends when its client leaves.
FOREVER: Json = {"model": "m", "prompt": "x", "max_tokens": 10_000, "stream": True, "fake": {"token_s": 0.02}}
SHORT: Json = {"model": "m", "prompt": "x", "max_tokens": 2, "fake": {"token_s": 0}}
POLICY = """version: 1
classes:
  high: {max_waiting: 16}
  medium: {max_waiting: 16}
  low: {max_waiting: 3}
limits:
- {class: medium, requests_per_minute: 6, burst_s: 30}
- {class: low, tokens_per_minute: 60000, burst_s: 1}
"""


@pytest.fixture(scope="module")
def one_slot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One slot; callers are of class high."""
    policy = tmp_path_factory.mktemp("qos") / "policy.yaml"
    policy.write_text(POLICY)
    with Served.fake("--qos_policy", str(policy), "--qos_priority", "high", slots=1) as server:
        yield server


def sums(server: Served, family: str, **labels: str) -> float:
    """Of the samples with those labels."""
    text = httpx.get(f"{server.url}/metrics").text
    samples = [sample for each in text_string_to_metric_families(text) for sample in each.samples]
    return sum(
        sample.value for sample in samples if sample.name == family and labels.items() <= dict(sample.labels).items()
    )


async def until(server: Served, family: str, value: float, **labels: str) -> None:
    deadline = time.monotonic() + 30
    while (seen := await asyncio.to_thread(sums, server, family, **labels)) != value:
        assert time.monotonic() < deadline, (family, labels, seen)
        await asyncio.sleep(0.02)


@asynccontextmanager
async def occupied(client: httpx.AsyncClient, body: Json = FOREVER) -> AsyncIterator[None]:
    """The engine's slot is taken inside."""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = answer.aiter_lines()  # whose end would be the connection's
        await anext(lines)
        yield


def http(server: Served) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=60)


async def ask(client: httpx.AsyncClient, done: list[str], name: str, headers: Json, **more: Any) -> httpx.Response:
    answer = await client.post("/v1/completions", json={**SHORT, **more}, headers=headers)
    done.append(name)
    return answer


async def queued(server: Served, asks: Sequence[Any]) -> list[asyncio.Task[Any]]:
    """One after the other, each in the queue before the next comes."""
    tasks = []
    for each in asks:
        tasks.append(asyncio.create_task(each))
        await until(server, "aim_qos_waiting", len(tasks))
    return tasks


# --- order ------------------------------------------------------------------------------------------------------------


async def test_the_important_one_overtakes(one_slot: Served) -> None:
    done: list[str] = []
    async with http(one_slot) as client:
        async with occupied(client):
            asks = [ask(client, done, "low 1", LOW), ask(client, done, "low 2", LOW), ask(client, done, "high", {})]
            tasks = await queued(one_slot, asks)
            assert done == []
        answers = await asyncio.gather(*tasks)
    assert done == ["high", "low 1", "low 2"]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [answer.headers["x-qos-priority"] for answer in answers] == ["low", "low", "high"]
    lines = [line for line in one_slot.access_lines() if line.get("class") == "low"]
    assert all(line["tenant"] == "default" and line["queue_ms"] > 0 for line in lines[-2:])


async def test_the_engines_own_queue_stays_empty(one_slot: Served) -> None:
    async with http(one_slot) as client:
        async with occupied(client):
            tasks = await queued(one_slot, [ask(client, [], "a", {}), ask(client, [], "b", {})])
            state = (await client.post("/v1/fake/state", json={})).json()
            assert (state["running"], state["waiting"]) == (1, 0)
            assert await asyncio.to_thread(sums, one_slot, "aim_requests_waiting") == 2
            assert (await client.post("/v1/tokenize", json={"prompt": "a b"})).json()["count"] == 2
        await asyncio.gather(*tasks)


async def test_a_client_that_leaves_while_it_waits_is_forgotten_at_once(one_slot: Served) -> None:
    async with http(one_slot) as client, http(one_slot) as impatient:
        async with occupied(client):
            before = (await client.post("/v1/fake/state", json={})).json()["seen"]
            (leaving,) = await queued(one_slot, [ask(impatient, [], "gone", {})])
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            await until(one_slot, "aim_qos_waiting", 0)
            assert (await client.post("/v1/fake/state", json={})).json()["seen"] == before  # the engine never heard
        await until(one_slot, "aim_qos_running", 0)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(answer: httpx.Response, status: int, code: str) -> Json:
    error: Json = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/json"  # before the 200 of a stream
    if status != 400:
        assert int(answer.headers["retry-after"]) >= 1
    return error


async def test_a_full_queue_refuses_its_own_class_only(one_slot: Served) -> None:
    done: list[str] = []
    async with http(one_slot) as client:
        async with occupied(client):
            tasks = await queued(one_slot, [ask(client, done, str(at), LOW) for at in range(3)])
            error = refused(await ask(client, [], "", LOW, stream=True), 429, "queue_full")
            assert "low" in error["message"]
            assert error["type"] == "rate_limit_error"
            high = asyncio.create_task(ask(client, done, "high", {}))
            await until(one_slot, "aim_qos_waiting", 4)
        assert [answer.status_code for answer in await asyncio.gather(*tasks, high)] == [200] * 4
    assert sums(one_slot, "aim_qos_rejections_total", reason="queue_full", **{"class": "low"}) == 1


def test_a_rate_is_a_429_that_openais_client_understands(one_slot: Served) -> None:
    headers = {"x-qos-priority": "medium"}
    with openai.OpenAI(base_url=f"{one_slot.url}/v1", api_key="none", max_retries=0) as client:
        for _ in range(3):
            client.completions.create(model="m", prompt="x", max_tokens=1, extra_headers=headers)
        with pytest.raises(openai.RateLimitError) as refusal:
            client.completions.create(model="m", prompt="x", max_tokens=1, extra_headers=headers, stream=True)
        assert refusal.value.code == "rate"
        assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 10
        client.completions.create(model="m", prompt="x", max_tokens=1)  # another class


def test_what_no_budget_holds_is_the_clients_mistake(one_slot: Served) -> None:
    answer = httpx.post(f"{one_slot.url}/v1/completions", json={**SHORT, "max_tokens": 5000}, headers=LOW)
    assert "lower max_tokens" in refused(answer, 400, "too_large")["message"]


async def test_a_deadline_that_passes_in_the_queue_is_a_503(one_slot: Served) -> None:
    async with http(one_slot) as client, occupied(client):
        answer = await ask(client, [], "", {"x-slo-ttft-ms": "200"}, stream=True)
        refused(answer, answer.status_code, "deadline")
        assert answer.status_code in (429, 503)  # known to be late at once, or found out
        assert (await client.post("/v1/fake/state", json={})).json()["waiting"] == 0


@pytest.mark.parametrize(
    ("headers", "body", "says"),
    [
        ({"x-qos-priority": "urgent"}, {}, "x-qos-priority: 'urgent' is no class: give high, medium or low"),
        ({"x-slo-ttft-ms": "soon"}, {}, "x-slo-ttft-ms: 'soon' is no time: give milliseconds > 0"),
        ({"x-slo-ttft-ms": "-1"}, {}, "x-slo-ttft-ms: '-1' is no time"),
        ({"x-slo-ttft-ms": "inf"}, {}, "x-slo-ttft-ms: 'inf' is no time"),
        ({}, {"service_tier": "gold"}, "service_tier: 'gold' is no tier: give auto, default or flex"),
    ],
)
def test_what_is_no_level_is_refused_by_name(one_slot: Served, headers: Json, body: Json, says: str) -> None:
    answer = httpx.post(f"{one_slot.url}/v1/completions", json={**SHORT, **body}, headers=headers)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "body", "served_as"),
    [
        ({}, {}, "high"),
        ({"x-qos-priority": "HIGH"}, {}, "high"),
        (LOW, {}, "low"),
        ({}, {"service_tier": "flex"}, "low"),
        ({}, {"service_tier": "priority"}, "high"),
        ({"x-qos-priority": "high"}, {"service_tier": "flex"}, "low"),
    ],
)
def test_a_caller_may_only_step_back(one_slot: Served, headers: Json, body: Json, served_as: str) -> None:
    answer = httpx.post(f"{one_slot.url}/v1/completions", json={**SHORT, **body}, headers=headers)
    assert (answer.status_code, answer.headers["x-qos-priority"]) == (200, served_as)


# --- other protocols --------------------------------------------------------------------------------------------------


async def test_v2_and_grpc_wait_in_the_same_queue(one_slot: Served) -> None:
    tensor = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    body = {"inputs": [tensor], "parameters": {"max_tokens": 1}}
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    async with http(one_slot) as client, grpc.aio.insecure_channel(one_slot.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        async with occupied(client):
            rest = client.post("/v2/models/m/infer", json=body, headers=LOW)
            (one,) = await queued(one_slot, [rest])
            call = stub.ModelInfer(request, metadata=(("x-qos-priority", "low"),))
            await until(one_slot, "aim_qos_waiting", 2, **{"class": "low"})
            three = asyncio.create_task(ask(client, [], "", LOW))
            await until(one_slot, "aim_qos_waiting", 3)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.ModelInfer(request, metadata=(("x-qos-priority", "low"),))
            trailing = dict(refusal.value.trailing_metadata())
            assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(trailing["retry-after"]) >= 1
            full = await client.post("/v2/models/m/infer", json=body, headers=LOW)
            assert (full.status_code, int(full.headers["retry-after"]) >= 1) == (429, True)
        assert (await one).headers["x-qos-priority"] == "low"
        assert dict(await call.trailing_metadata())["x-qos-priority"] == "low"
        assert (await three).status_code == 200


def test_nobodys_priority_reaches_an_engine(fake: Served) -> None:
    """With service levels off, too."""
    answer = httpx.post(f"{fake.url}/v1/completions", json={**SHORT, "model": "m", "priority": -7})
    assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, "priority")
    echo = httpx.post(f"{fake.url}/v1/fake/echo", json={"model": "m", "priority": -7}).json()
    assert "priority" not in echo["body"]
    tensor = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    body = {"inputs": [tensor], "parameters": {"priority": 3, "max_tokens": 1}}
    answer = httpx.post(f"{fake.url}/v2/models/m/infer", json=body)
    assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, "priority")


def test_strict_fields_refuse_a_priority() -> None:
    with Served.fake("--strict_fields") as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={**SHORT, "priority": 1})
        assert answer.status_code == 400
        assert "priority: who goes first is decided by the class" in answer.json()["error"]["message"]
        tensor = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
        body = {"inputs": [tensor], "parameters": {"priority": 3}}
        assert httpx.post(f"{server.url}/v2/models/m/infer", json=body).status_code == 400


# --- the engine's life ------------------------------------------------------------------------------------------------


async def test_those_that_wait_are_served_by_the_next_process() -> None:
    """Whoever was in the engine is told; whoever was not never notices."""
    with Served.fake("--qos", process=True, slots=1) as server:
        async with http(server) as client, http(server) as other:
            hold = {**FOREVER, "max_tokens": 500, "stream": False}
            running = asyncio.create_task(client.post("/v1/completions", json=hold))
            await until(server, "aim_qos_running", 1)
            tasks = await queued(server, [ask(client, [], "a", {}), ask(client, [], "b", LOW)])
            with pytest.raises(httpx.HTTPStatusError):
                (await other.post("/v1/odd/kill", json={})).raise_for_status()
            assert (await running).status_code == 503
            assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200, 200]
        assert sums(server, "aim_engine_restarts_total") == 1


async def test_a_model_leaves_when_its_queue_is_served() -> None:
    models = {"m": {"engine": {"slots": 1}}, "other": {}}
    with Served.fake_models("--qos", models=models) as server:
        async with http(server) as client:
            async with occupied(client):
                tasks = await queued(server, [ask(client, [], str(at), {}) for at in range(3)])
                leaving = asyncio.create_task(client.post("/v2/repository/models/m/unload"))
                await until(server, "aim_model_state", 1, model_name="m", state="unloading")
                assert (await ask(client, [], "late", {})).status_code == 503
            assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 3
            assert (await leaving).status_code == 200
            assert sums(server, "aim_qos_running", model_name="m") == 0
            assert (await client.post("/v2/repository/models/m/load")).status_code == 200
            assert (await ask(client, [], "", {})).headers["x-qos-priority"] == "medium"


async def test_what_one_replica_has_no_room_for_goes_to_another(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\nclasses: {medium: {max_waiting: 1}}\n")
    models = {"m": {"engine": {"slots": 1}, "replicas": 2}}
    with Served.fake_models("--qos_policy", str(policy), models=models) as server:
        async with http(server) as client:
            async with occupied(client), occupied(client):
                tasks = await queued(server, [ask(client, [], str(at), {}, prompt="x") for at in range(2)])
                refused(await ask(client, [], "", {}), 429, "queue_full")
            assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 2


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_wrong_policy_refuses_the_start(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\nclasses:\n  low: {kv_ceilin: 0.5}\n")
    with Served.fake("--qos_policy", str(policy), wait=False) as server:
        assert server.exit_code() == 1
        assert "policy.yaml:3: classes.low.kv_ceilin" in server.stderr()
        assert "Traceback" not in server.stderr()


def test_a_promise_without_service_levels_is_a_contradiction() -> None:
    with pytest.raises(SettingsError, match="--latency_slo_ms needs --qos: leave one of both out"):
        RuntimeSettings.load(["--qos", "false", "--latency_slo_ms", "500"], {}, prog="p", description="")


def test_the_dry_run_tells_the_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = tmp_path / "node.yaml"
    node.write_text(export_node(emulate("MI300X", cards=1)))
    flags = ["--dry_run", "--qos", "--node", str(node), "--model_dir", str(write_model(tmp_path / "llama"))]
    assert dry_run(RuntimeSettings.load([*flags, "-o", "json"], {}, prog="p", description="")) == 0
    assert json.loads(capsys.readouterr().out)["qos_policy"]["classes"]["low"]["max_waiting"] == 256
    assert dry_run(RuntimeSettings.load(flags, {}, prog="p", description="")) == 0
    assert "service levels:" in capsys.readouterr().out


def test_the_dry_run_tells_what_each_model_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Promises of a file of models turn service levels on, as the flag does."""
    node, models, model = tmp_path / "node.yaml", tmp_path / "models.yaml", write_model(tmp_path / "llama")
    node.write_text(export_node(emulate("MI300X", cards=2)))
    entries = f"- {{name: a, path: {model}, priority: high, latency_slo_ms: 300}}\n- {{name: b, path: {model}}}\n"
    models.write_text(f"version: 1\nmodels:\n{entries}")
    flags = ["--dry_run", "--node", str(node), "-o", "json", "--models", str(models)]

    def promised(*more: str) -> list[Any]:
        code = dry_run(RuntimeSettings.load([*flags, *more], {}, prog="p", description=""))
        told = json.loads(capsys.readouterr().out)
        if code:
            return [told["refused"]["problem"]]
        classes = [each["qos_policy"]["classes"] for each in told]
        return [{name: each["slo"] and each["slo"]["ttft_ms"] for name, each in own.items()} for own in classes]

    nothing = {"high": None, "medium": None, "low": None}
    assert promised() == [nothing | {"high": 300}, nothing]
    assert promised("--latency_slo_ms", "900") == [nothing | {"high": 300}, nothing | {"high": 900, "medium": 900}]
    (why,) = promised("--qos", "false")
    assert "models.yaml:3: models[0].latency_slo_ms: --latency_slo_ms needs --qos: leave one of both out" in why


# --- with identity ----------------------------------------------------------------------------------------------------


async def test_class_and_tenant_are_the_credentials(tmp_path: Path) -> None:
    """On every protocol; a caller of class medium steps back, and never up."""
    made = {name: key_file.new_key(name, tenant=name, qos_class="medium") for name in ("acme", "umbrella")}
    made["scraper"] = key_file.new_key("scraper", tenant="scraper", scopes=["metrics"])
    key_file.write(tmp_path / "keys.yaml", key_file.KeyFile(keys=tuple(entry for _, entry in made.values())))
    acme, umbrella, scraper = ({"authorization": f"Bearer {text}"} for text, _ in made.values())
    stranger = {"x-tenant": "acme", "x-qos-priority": "high"}
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    with Served.fake("--qos", "--api_keys", str(tmp_path / "keys.yaml"), slots=1) as server:
        async with http(server) as client, grpc.aio.insecure_channel(server.grpc_url) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            assert (await ask(client, [], "", stranger)).status_code == 401
            answer = await ask(client, [], "", {**umbrella, **stranger})
            assert (answer.status_code, answer.headers["x-qos-priority"]) == (200, "medium")
            call = stub.ModelInfer(request, metadata=tuple({**acme, "x-qos-priority": "low"}.items()))
            assert dict(await call.trailing_metadata())["x-qos-priority"] == "low"
            text = (await client.get("/metrics", headers=scraper)).text
        assert "aim_qos_running" in text
        lines = [(line["tenant"], line["class"]) for line in server.access_lines() if "tenant" in line]
        assert {("umbrella", "medium"), ("acme", "low")} <= set(lines)
