"""The real server over the real embedded engine in a process of its own: what befalls the engine costs one restart."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import orjson
import psutil
import pytest

from aim_kserve.server import LATE_S
from served import Served

pytestmark = pytest.mark.model

WEDGED = Path(__file__).parents[1] / "fakes/wedged_runtime.py"
WEDGE = {"prompt": "hi", "response_format": {"type": "json_object"}}
ASK = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
LONG = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True}


def served(model: Path, *flags: str, program: tuple[str, ...] = (str(WEDGED),), wait: bool = True) -> Served:
    told = ["--model_name", "m", "--model_dir", str(model.parent), "--threads", "1", "--max_model_len", "512"]
    return Served([*program, *told, *flags], wait=wait)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def post(server: Served, body: dict[str, object]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def engines(server: Served) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def metric(server: Served, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def test_a_request_that_wedges_the_engine_costs_one_restart(embedded_model: Path, pool: ThreadPoolExecutor) -> None:
    with served(embedded_model, "--stall_timeout", "2") as server:
        (engine,) = engines(server)
        before = post(server, ASK).json()["choices"][0]["text"]
        wedge: Future[httpx.Response] = pool.submit(post, server, WEDGE)
        others = []
        while not wedge.done():
            others.append(pool.submit(post, server, ASK))
            assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
            time.sleep(0.1)
        for answer in (wedge.result(), *(other.result() for other in others)):
            if answer.status_code == 200:  # it came before the engine stood still
                assert answer.json()["choices"][0]["text"] == before
                continue
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "has not moved for" in answer.json()["error"]["message"]
        assert wedge.result().status_code == 503
        server.wait_ready()
        assert post(server, ASK).json()["choices"][0]["text"] == before
        assert metric(server, "aim_engine_restarts_total") == 1
        assert server.stderr().count("model m: warmed up") == 2  # no client waits for the next one's first steps either
        assert gone(engine)
        server.terminate()
        assert server.exit_code(30) == 0
        assert "Traceback" not in server.stderr()


def test_killed_in_the_middle_of_streams_everyone_is_told_and_it_comes_back(
    embedded_model: Path, pool: ThreadPoolExecutor
) -> None:
    with served(embedded_model, program=("-m", "aim_runtime")) as server:
        (engine,) = engines(server)

        def stream(number: int) -> list[str]:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
                assert answer.status_code == 200
                lines = []
                for line in answer.iter_lines():
                    lines += [line] if line else []
                    if len(lines) == 3 and number == 0:
                        engine.kill()
                return lines

        for lines in pool.map(stream, range(4)):
            assert lines[-1] == "data: [DONE]"
            error = orjson.loads(lines[-2].removeprefix("data: "))["error"]
            assert error["code"] == "engine_restarting"
            assert "was killed by SIGKILL" in error["message"]
            assert all('"text":"' in line for line in lines[:-2])
        server.wait_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert client.completions.create(model="m", prompt="Hello", max_tokens=4).choices[0].text
        assert metric(server, "aim_engine_restarts_total") == 1


@pytest.mark.parametrize("grace_s", [4])
def test_terminated_with_a_wedged_engine_it_ends_in_time_and_leaves_nothing(
    embedded_model: Path, pool: ThreadPoolExecutor, grace_s: int
) -> None:
    with served(embedded_model, "--stall_timeout", "600", "--grace_period", str(grace_s)) as server:
        (engine,) = engines(server)
        asked = pool.submit(post, server, WEDGE)
        while metric(server, "aim_requests_running") + metric(server, "aim_requests_waiting") == 0:
            assert not asked.done(), asked.result().text
            time.sleep(0.02)
        server.terminate()
        assert server.exit_code(grace_s + LATE_S) == 0
        assert asked.result(10).status_code == 503
        assert gone(engine)
        assert "Traceback" not in server.stderr()


def test_streams_in_flight_end_before_the_engine_does(embedded_model: Path) -> None:
    with served(embedded_model) as server:
        (engine,) = engines(server)
        body = {**LONG, "max_tokens": 100, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.terminate()
            *_, usage, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        assert orjson.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 100
        assert server.exit_code(30) == 0
        assert gone(engine)


def test_a_server_that_is_killed_takes_its_engine_along(embedded_model: Path) -> None:
    with served(embedded_model) as server:
        (engine,) = engines(server)
        os.kill(server.process.pid, signal.SIGKILL)
        server.exit_code(10)
        deadline = time.monotonic() + 10
        while not gone(engine):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_file_that_is_no_model_ends_the_server_with_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(100))
    with served(broken, wait=False, program=("-m", "aim_runtime")) as server:
        assert server.exit_code(60) == 1
        last = server.stderr().splitlines()[-1]
        assert last.startswith("error: model m: llama.cpp cannot load")
        assert "broken.gguf" in last
        assert "Traceback" not in server.stderr()


def test_the_engines_process_knows_no_server(embedded_model: Path) -> None:
    with served(embedded_model) as server:
        (engine,) = engines(server)
        mapped = {Path(region.path).name for region in engine.memory_maps() if region.path}
        assert any(name.startswith("libllama") for name in mapped)
        assert not any("httptools" in name or "grpc" in name or "cygrpc" in name for name in mapped)
        own = {Path(region.path).name for region in psutil.Process(server.process.pid).memory_maps() if region.path}
        assert not any(name.startswith("libllama") for name in own)


def test_a_pod_that_was_paused_goes_on_where_it_was(embedded_model: Path, pool: ThreadPoolExecutor) -> None:
    """Longer than the engine may stand still: both processes were stopped, nothing is wrong with either."""
    with served(embedded_model, "--stall_timeout", "4") as server:
        asked = pool.submit(post, server, {**ASK, "max_tokens": 300, "ignore_eos": True})
        time.sleep(0.5)
        processes = [psutil.Process(server.process.pid), *engines(server)]
        for process in processes:
            process.suspend()
        time.sleep(6)
        for process in processes:
            process.resume()
        assert asked.result().json()["usage"]["completion_tokens"] == 300
        assert metric(server, "aim_engine_restarts_total") == 0
