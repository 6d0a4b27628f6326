"""SGLang's server as a child: its command, its answers, its end. Against a double that answers in SGLang's recorded
formats (``tests/fakes/sglang_double``): SGLang itself needs a GPU and an image of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import psutil
import pytest

from aim_runtime.engines import registry
from aim_runtime.engines.base import Engine, EngineSpec, ModelLoadError, RequestContext
from aim_runtime.engines.openai_server import process as process_module
from aim_runtime.engines.sglang.kind import SglangSettings, server_command
from served import Served

DOUBLE = Path(__file__).parents[1] / "fakes" / "sglang_double"


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(DOUBLE), os.environ.get("PYTHONPATH", "")]))


def engine_for(model_dir: Path, **options: Any) -> Engine:
    options = {"sglang_python": sys.executable, "server_start_timeout": 20, **options}
    return registry.create(EngineSpec("sglang", model_dir, "m", options=options))


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


async def until_gone(processes: list[psutil.Process]) -> None:
    async with asyncio.timeout(20):
        while any(process.is_running() and process.status() != "zombie" for process in processes):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_the_plan_says() -> None:
    spec = EngineSpec("sglang", Path("/models/m"), "org/m", 4096, 32)
    settings = SglangSettings(
        tensor_parallel_size=4,
        mem_fraction_static=0.8,
        engine_args={"attention-backend": "aiter", "log_requests": True},
    )
    command = " ".join(server_command(spec, settings, 30001))
    assert command == (
        f"{sys.executable} -m sglang.launch_server --model-path /models/m --served-model-name org/m --host 127.0.0.1 "
        "--port 30001 --context-length 4096 --max-running-requests 32 --tp-size 4 --mem-fraction-static 0.8 "
        "--enable-metrics --attention-backend=aiter --log-requests"
    )


@pytest.mark.parametrize("args", ["--port 1", "--tp=2", '{"mem_fraction_static": 0.5}', "--host=0.0.0.0"])
def test_what_the_runtime_says_is_not_said_again(args: str) -> None:
    settings = SglangSettings.model_validate({"engine_args": args})
    with pytest.raises(ModelLoadError, match="for this runtime to give to SGLang: leave it out"):
        server_command(EngineSpec("sglang", Path(), "m"), settings, 1)


def test_without_sglang_it_is_named() -> None:
    with pytest.raises(ModelLoadError, match=r"the sglang engine is not installed .* --sglang_python"):
        registry.create(EngineSpec("sglang", Path(), "m"))


# --- life -----------------------------------------------------------------------------------------------------------


async def test_a_child_server_serves_and_leaves_nothing_behind(double: None, tmp_path: Path) -> None:
    before = children()
    engine = engine_for(tmp_path, tensor_parallel_size=2, mem_fraction_static=0.5)
    await engine.load()
    ours = [process for process in children() if process not in before]
    assert len(ours) == 3  # what guards it, the server, its scheduler
    assert (engine.name, engine.version, engine.max_model_len) == ("sglang", "0.5.23", 131072)
    assert {"chat/completions", "completions", "embeddings", "tokenize"} == set(engine.operations)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0.28)
    answer = await engine.operations["completions"]({"prompt": "a b", "max_tokens": 2}, RequestContext("r"))
    assert isinstance(answer, dict)
    assert (answer["model"], answer["choices"][0]["text"]) == ("m", " word0 word1")
    await engine.close()
    await until_gone(ours)


async def test_a_server_that_ends_is_unhealthy_and_its_scheduler_ends_too(double: None, tmp_path: Path) -> None:
    before = children()
    engine = engine_for(tmp_path)
    await engine.load()
    ours = [process for process in children() if process not in before]
    next(process for process in ours if "sglang.launch_server" in process.cmdline()[1:3]).kill()
    await until_gone(ours)
    async with asyncio.timeout(5):
        while engine.healthy():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await engine.close()


async def test_a_start_that_fails_says_why(double: None, tmp_path: Path) -> None:
    before = children()
    (tmp_path / "crash").touch()
    with pytest.raises(ModelLoadError, match=r"sglang server ended with 137: RuntimeError: Not enough memory"):
        await engine_for(tmp_path).load()
    (tmp_path / "crash").unlink()
    (tmp_path / "hang").touch()
    with pytest.raises(ModelLoadError, match=r"did not become ready within 3 s .*; its last words: \[2026"):
        await engine_for(tmp_path, server_start_timeout=3).load()
    with pytest.raises(ModelLoadError, match=r"ended with 2: .*unrecognized arguments: --no-such-flag"):
        await engine_for(tmp_path, engine_args="--no-such-flag").load()
    with pytest.raises(ModelLoadError, match="ended with 127: /no/python: No such file or directory"):
        await engine_for(tmp_path, sglang_python="/no/python").load()
    await until_gone([process for process in children() if process not in before])


async def test_a_server_that_does_not_want_to_end_is_ended(
    double: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "GRACE_S", 0.2)
    before = children()
    (tmp_path / "stubborn").touch()
    engine = engine_for(tmp_path)
    await engine.load()
    ours = [process for process in children() if process not in before]
    await engine.close()
    await until_gone(ours)


# --- behind the whole runtime ---------------------------------------------------------------------------------------


@pytest.fixture
def served(double: None, tmp_path: Path) -> Iterator[Served]:
    flags = ["--engine", "sglang", "--sglang_python", sys.executable, "--model_dir", str(tmp_path)]
    with Served(["-m", "aim_runtime", *flags, "--model_name", "m", "--max_model_len", "4096"]) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_stock_clients_speak_to_it(served: Served, client: openai.OpenAI) -> None:
    ask: Any = [{"role": "user", "content": "a b c"}]
    answer = client.chat.completions.create(model="m", messages=ask, max_tokens=3)
    assert answer.choices[0].message.content == " word0 word1 word2"
    with client.completions.create(
        model="m", prompt="a b", max_tokens=3, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == " word0 word1 word2"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match="exceeds the model's maximum context length"):
        client.chat.completions.create(model="m", messages=ask, max_tokens=5000)
    predicted = httpx.post(
        f"{served.url}/v1/models/m:predict",
        json={"instances": ["a", "b"], "parameters": {"max_tokens": 1, "top_k": 3, "regex": "x"}},
    ).json()
    assert predicted == {"predictions": [" word0", " word0"]}
    version = httpx.get(f"{served.url}/version").json()
    assert version == {"version": "0.5.23", "engine": "sglang"}


def test_a_server_that_dies_is_started_again(served: Served, client: openai.OpenAI) -> None:
    server = next(
        process
        for process in psutil.Process(served.process.pid).children(recursive=True)
        if "sglang.launch_server" in process.cmdline()[1:3]
    )
    server.kill()
    deadline = time.monotonic() + 60
    refused = 0
    while time.monotonic() < deadline:
        try:
            client.completions.create(model="m", prompt="a", max_tokens=1)
        except openai.InternalServerError as error:
            assert error.status_code == 503  # noqa: PT017  any other status would be a lie
            refused += 1
        else:
            if refused:
                return
        time.sleep(0.05)
    raise AssertionError(f"it did not come back: {refused} requests were refused")


def test_it_dies_with_the_runtime(served: Served) -> None:
    descendants = psutil.Process(served.process.pid).children(recursive=True)
    assert len(descendants) >= 3
    served.process.send_signal(signal.SIGKILL)
    served.process.wait(10)
    deadline = time.monotonic() + 20
    while any(process.is_running() and process.status() != "zombie" for process in descendants):
        assert time.monotonic() < deadline, "a process outlived the runtime"
        time.sleep(0.02)


@pytest.mark.parametrize("flag", ["--partition_count=2", "--memory_limit=8GiB", "--compute_partition=CPX", "--card=1"])
def test_devices_that_nobody_would_see_to_are_refused(tmp_path: Path, flag: str) -> None:
    command = [sys.executable, "-m", "aim_runtime", "--engine", "sglang", "--model_dir", str(tmp_path), flag]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "this runtime neither sizes the sglang engine nor gives it devices; leave it out" in done.stderr


def test_a_dry_run_says_what_is_known(tmp_path: Path) -> None:
    flags = ["--engine", "sglang", "--model_dir", str(tmp_path), "--max_model_len", "4096", "--dry_run", "-o", "json"]
    done = subprocess.run([sys.executable, "-m", "aim_runtime", *flags], capture_output=True, check=True, timeout=60)
    said = orjson.loads(done.stdout)
    assert (said["engine"], said["devices"], said["fit"]) == ("sglang", [], {})
    assert said["engine_args"] == {"max-model-len": 4096}
    assert "not sized: the memory of sglang is its own to know" in said["evidence"]["notes"]
