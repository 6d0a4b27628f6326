"""The process: it listens first, tells the truth, drains, and ends with the right code and one line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry

from aim_kserve.errors import Unavailable
from aim_kserve.http import SHUTDOWN
from aim_kserve.kserve import pb, pb_grpc
from aim_kserve.server import LATE_S
from aim_runtime.engines.base import RequestContext
from aim_runtime.metrics import Metrics
from aim_runtime.model import RuntimeModel
from fake_engine import FakeEngine
from served import Served

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def loading() -> Iterator[Served]:
    """A server whose engine loads for longer than the tests last."""
    with Served.fake(wait=False, load_s=600) as server:
        server.wait_status("/v2/health/live", 200)
        yield server


@pytest.mark.parametrize("path", ["/v2/health/ready", "/v2/models/m/ready", "/v1/models/m"])
def test_not_ready_while_loading(loading: Served, path: str) -> None:
    assert httpx.get(loading.url + path).status_code == 503


def test_vllms_own_questions_are_answered_as_vllm_does(fake: Served, loading: Served) -> None:
    for server, status in ((fake, 200), (loading, 503)):
        for answer in (
            httpx.get(f"{server.url}/health"),
            httpx.get(f"{server.url}/ping"),
            httpx.post(f"{server.url}/ping"),
        ):
            assert (answer.status_code, answer.content) == (status, b"")
        assert httpx.get(f"{server.url}/version").json() == {"version": "1.2.3", "engine": "fake"}
        assert httpx.get(f"{server.url}/load").json() == {"server_load": 0}
    body = {"messages": ASK, "stream": True, "max_tokens": 1000, "fake": {"token_s": 0.01}}
    with httpx.stream("POST", fake.url + CHAT, json=body) as stream:
        lines = stream.iter_lines()  # kept: httpx closes the connection with it
        next(lines)
        assert httpx.get(f"{fake.url}/load").json() == {"server_load": 1}


def test_what_is_true_while_loading(loading: Served) -> None:
    assert httpx.get(f"{loading.url}/").status_code == 200
    assert httpx.get(f"{loading.url}/v1/models").json()["models"] == ["m"]
    assert "aim_engine_slots" in httpx.get(f"{loading.url}/metrics").text
    with grpc.insecure_channel(loading.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(pb.ServerLiveRequest()).live
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        assert not stub.ModelReady(pb.ModelReadyRequest(name="m")).ready
        request = pb.ModelInferRequest(model_name="m")
        request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/openai/v1/completions"])
def test_requests_are_told_to_come_again_while_loading(loading: Served, path: str) -> None:
    answer = httpx.post(loading.url + path, json={"messages": ASK})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "service_unavailable"


def test_predict_is_told_to_come_again_while_loading(loading: Served) -> None:
    answer = httpx.post(f"{loading.url}/v1/models/m:predict", json={"instances": ["x"]})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1


def test_a_model_that_cannot_be_loaded_ends_with_1_and_one_line() -> None:
    with Served.fake(wait=False, load_error="/mnt/models/x.gguf: bad magic") as server:
        assert server.exit_code() == 1
        assert server.stderr().splitlines()[-1] == "error: model m: /mnt/models/x.gguf: bad magic"
        assert "Traceback" not in server.stderr()


def test_whatever_ends_the_start_is_in_the_termination_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options, says in (
            ({"http_port": port}, f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another"),
            ({"grpc_port": port}, f"cannot listen on 127.0.0.1:{port} (gRPC): choose another --grpc_port"),
            ({}, "model m: /mnt/models/x.gguf: bad magic"),
        ):
            arguments = Served.fake_arguments("--termination_log", str(log), load_error="/mnt/models/x.gguf: bad magic")
            with Served(arguments, wait=False, **options) as server:
                assert server.exit_code() == 1
                assert log.read_text().startswith(says)
                said = [line for line in server.stderr().splitlines() if " INFO " not in line and " ERROR " not in line]
                assert said == [f"error: {log.read_text()}"]  # and nothing of gRPC's own
    env = {**os.environ, "AIM_TERMINATION_LOG": str(log), "AIM_MEMORY_LIMIT": "much", "AIM_PARTITION_ID": "none"}
    done = subprocess.run([sys.executable, "-m", "aim_runtime"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert [f"error: {line}" for line in log.read_text().splitlines()] == done.stderr.splitlines()
    assert "AIM_MEMORY_LIMIT: 'much' is not a memory size" in log.read_text()


@pytest.mark.parametrize("package", ["aim_runtime", "aim_guardrail"])
def test_terminated_while_settings_are_imported_ends_with_0(package: str) -> None:
    """A container's first process ignores a signal that it does not handle: its grace period would pass for nothing."""
    program = (
        "import os, runpy, signal, sys, importlib.abc\n"
        "class Late(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'pydantic': os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Late())\n"
        f"runpy.run_module('{package}', run_name='__main__')\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == 0


def test_terminated_while_loading_ends_with_0() -> None:
    with Served.fake(wait=False, load_s=600) as server:
        server.wait_status("/v2/health/live", 200)
        server.terminate()
        assert server.exit_code(10) == 0


def test_a_stream_in_flight_completes_while_new_connections_are_refused() -> None:
    with Served.fake(token_s=0.02) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        body = {"messages": ASK, "stream": True, "max_tokens": 75}
        with client.stream("POST", CHAT, json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.terminate()
            deadline = time.monotonic() + 5
            while _accepts(server.http_port):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert sum('"content":"' in line for line in rest) == 75
        assert server.exit_code(10) == 0
        assert "Traceback" not in server.stderr()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_request_over_grpc_in_flight_completes() -> None:
    with Served.fake(token_s=0.02) as server, grpc.insecure_channel(server.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        request = pb.ModelInferRequest(model_name="m")
        request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
        request.parameters["max_tokens"].int64_param = 50
        answer = stub.ModelInfer.future(request)
        while httpx.post(f"{server.url}/v1/fake/state", json={}).json()["running"] == 0:
            assert not answer.done()
        server.terminate()
        assert len(answer.result(10).outputs[0].contents.bytes_contents[0].split()) == 50
        assert server.exit_code(10) == 0


def test_what_does_not_finish_in_the_grace_period_is_told() -> None:
    with Served.fake("--grace_period", "1", token_s=0.02) as server, httpx.Client(base_url=server.url) as client:
        with client.stream("POST", CHAT, json={"messages": ASK, "stream": True, "max_tokens": 100_000}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.terminate()
            *_, error, done = [line for line in lines if line]
        assert orjson.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"
        assert server.exit_code(10) == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (asyncio.CancelledError(SHUTDOWN), "503"),
        (asyncio.CancelledError(), "499"),
        (asyncio.CancelledError("something else"), "499"),
        (ZeroDivisionError(), "500"),
        (Unavailable("full"), "503"),
    ],
)
async def test_who_ends_a_request_is_counted(error: BaseException, status: str) -> None:
    """A stream and a whole answer that end in ``error``."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"{}"
        raise error

    async def run(body: dict[str, Any], _: RequestContext) -> AsyncIterator[bytes]:
        if body.get("stream"):
            return chunks()
        raise error

    engine, registry = FakeEngine("m"), CollectorRegistry()
    model = RuntimeModel("m", engine, Metrics("m", engine, registry))
    await model.load_async()
    engine._operations = {"completions": run}
    with contextlib.suppress(BaseException):
        await model.call("completions", {}, RequestContext("r"))
    stream = await model.call("completions", {"stream": True}, RequestContext("r"))
    with contextlib.suppress(BaseException):
        _ = [chunk async for chunk in stream]
    counted = {"model_name": "m", "engine": "fake", "variant": "", "adapter": ""}
    counted |= {"operation": "completions", "status": status}
    assert registry.get_sample_value("aim_requests_total", counted) == 2


def test_a_shutdown_that_hangs_is_ended_with_1_and_one_line() -> None:
    with Served.fake("--grace_period", "0", close_s=600) as server:
        server.terminate()
        assert server.exit_code(30 + LATE_S) == 1
        assert (
            server.stderr().splitlines()[-1]
            == "error: shutting down took longer than 10 s: the process ends all the same"
        )
        assert "Traceback" not in server.stderr()


@pytest.mark.parametrize("name", ["http_port", "grpc_port"])
def test_a_taken_port_is_named(name: str, port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with Served(Served.fake_arguments(), wait=False, **{name: port}) as server:
            assert server.exit_code() == 1
            last = server.stderr().splitlines()[-1]
    assert last.startswith(f"error: cannot listen on 127.0.0.1:{port}")
    assert last.endswith(f"choose another --{name}")


def test_many_requests_at_once(fake: Served) -> None:
    with httpx.Client(base_url=fake.url, timeout=30) as client, ThreadPoolExecutor(32) as pool:
        body = {"messages": ASK, "fake": {"token_s": 0.001}}
        answers = list(pool.map(lambda _: client.post(CHAT, json=body).status_code, range(64)))
    assert answers == [200] * 64


def test_free_ports_are_told() -> None:
    arguments = [*Served.fake_arguments(), "--host", "127.0.0.1", "--http_port", "0", "--grpc_port", "0"]
    with subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = [re.search(r"listening on (127\.0\.0\.1:(\d+)) \((\w+)\)", process.stderr.readline()) for _ in range(2)]
        (http, http_port, _), (_, grpc_port, _) = (match.groups() for match in told if match)
        assert 0 not in (int(http_port), int(grpc_port))
        assert httpx.get(f"http://{http}/v2/health/live").status_code == 200
        process.terminate()
        process.communicate()
        assert process.returncode == 0
