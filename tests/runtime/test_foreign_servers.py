"""The whole runtime in front of real servers: this very runtime over HTTP, and llama.cpp's own server as a child."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import orjson
import psutil
import pytest
import tritonclient.http as triton
from kserve import InferenceGRPCClient, InferInput, InferRequest

from fake_engine import words
from served import Served

pytestmark = pytest.mark.model

FAKES = Path(__file__).parents[1] / "fakes"
ASK: Any = [{"role": "user", "content": "Name three fruits."}]
GREEDY = {"max_tokens": 8, "temperature": 0}
ClientOf = Callable[[Served], openai.OpenAI]


@pytest.fixture(scope="module")
def front(real: Served) -> Iterator[Served]:
    """Our runtime in front of our runtime, under another name."""
    flags = ["--engine", "openai_server", "--server_url", f"{real.url}/v1", "--model_name", "ours"]
    with Served(["-m", "aim_runtime", *flags]) as server:
        yield server


@pytest.fixture(scope="module")
def child(embedded_model: Path) -> Iterator[Served]:
    """Our runtime in front of llama-server, which it starts."""
    command = f"{sys.executable} {FAKES / 'llama_server.py'} {{model_dir}} {{port}} theirs"
    flags = ["--engine", "openai_server", "--server_command", command, "--model_dir", str(embedded_model)]
    with Served(["-m", "aim_runtime", *flags, "--model_name", "ours"]) as server:
        yield server


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    with contextlib.ExitStack() as clients:
        yield lambda server: clients.enter_context(
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        )


def streamed(client: openai.OpenAI, model: str, **asked: Any) -> tuple[str, openai.types.CompletionUsage | None]:
    asked = asked or {"messages": ASK, **GREEDY}
    with client.chat.completions.create(
        model=model, stream=True, stream_options={"include_usage": True}, **asked
    ) as stream:
        chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {model}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text, chunks[-1].usage


def test_the_answers_are_the_servers(real: Served, front: Served, client_of: ClientOf) -> None:
    schema = {"name": "fruit", "schema": {"const": "apple"}}  # greedy texts may differ where two tokens are as likely
    asked: Any = {"messages": ASK, "response_format": {"type": "json_schema", "json_schema": schema}}
    expected = client_of(real).chat.completions.create(model="smollm2", **asked)
    got = client_of(front).chat.completions.create(model="ours", **asked)
    assert got.model == "ours"
    assert got.choices == expected.choices
    assert got.usage is not None
    assert expected.usage is not None
    assert got.usage.prompt_tokens == expected.usage.prompt_tokens
    assert got.usage.completion_tokens >= 1
    text, usage = streamed(client_of(front), "ours", **asked)
    assert text == expected.choices[0].message.content == '"apple"'
    assert usage is not None
    assert usage.prompt_tokens == expected.usage.prompt_tokens


def test_refusals_are_the_servers(front: Served, client_of: ClientOf) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client_of(front).chat.completions.create(model="ours", messages=ASK, temperature=-1, stream=stream)
        assert refused.value.param == "temperature"
    answer = httpx.post(f"{front.url}/v1/chat/completions", json={"messages": ASK, **GREEDY, "unheard_of": 1})
    assert answer.status_code == 200
    assert "x-ignored-fields" not in answer.headers  # who does not know the fields cannot say what is ignored


@pytest.fixture(scope="module")
def front_of_fake(fake: Served) -> Iterator[Served]:
    """In front of an engine that answers the same words always, or what arrived."""
    flags = ["--engine", "openai_server", "--server_url", fake.url, "--model_name", "ours"]
    with Served(["-m", "aim_runtime", *flags]) as server:
        yield server


def test_v1_and_v2_go_through_it(front_of_fake: Served) -> None:
    front, three = front_of_fake, "".join(words(3))
    asked: Any = {"instances": ["a", {"prompt": "b"}], "parameters": {"max_tokens": 3}}
    plain, whole = httpx.post(f"{front.url}/v1/models/ours:predict", json=asked).json()["predictions"]
    assert (plain, whole["text"], whole["usage"]["completion_tokens"]) == (three, three, 3)
    parsed = {"fake": {"parsed": True}, "temperature": 0.5, "stop": ["x"]}
    arrived = httpx.post(f"{front.url}/v1/models/ours:predict", json={"instances": ["a"], "parameters": parsed}).json()
    assert orjson.loads(arrived["predictions"][0]).items() >= {"temperature": 0.5, "stop": ["x"], "prompt": "a"}.items()
    refused = httpx.post(f"{front.url}/v1/models/ours:predict", json={**asked, "parameters": {"n": 2}})
    assert (refused.status_code, "use the OpenAI routes" in refused.text) == (400, True)

    tensor = triton.InferInput("prompt", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"a"], dtype=np.object_))
    with triton.InferenceServerClient(front.url.removeprefix("http://")) as client:
        answer = client.infer("ours", [tensor], parameters={"max_tokens": 3})
        assert answer.as_numpy("text").tolist() == [three.encode()]


async def test_grpcs_texts_become_what_the_fields_take(front_of_fake: Served) -> None:
    """KServe's gRPC client cannot send a float, and the server behind refuses a text for a number."""
    tensor = InferInput("prompt", [1], "BYTES", data=["a"])
    request = InferRequest("ours", [tensor], parameters={"max_tokens": "3", "temperature": "0.5"})
    client = InferenceGRPCClient(front_of_fake.grpc_url)
    try:
        answer = await client.infer(request)
    finally:
        await client.close()
    texts = {output.name: output for output in answer.outputs}["text"].as_numpy().tolist()
    assert [item.decode() if isinstance(item, bytes) else item for item in texts] == ["".join(words(3))]


def test_the_models_state_is_the_servers(front: Served, client_of: ClientOf) -> None:
    card = client_of(front).models.retrieve("ours").model_dump()
    assert card["max_model_len"] == 1024
    usage = [line for line in httpx.get(f"{front.url}/metrics").text.splitlines() if line.startswith("aim_kv_cache")]
    assert usage


def test_llama_server_as_a_child(child: Served, client_of: ClientOf) -> None:
    client = client_of(child)
    for _ in range(3):
        text, usage = streamed(client, "ours")
        assert text
        assert usage is not None
        assert 1 <= usage.completion_tokens <= 8
    answer = client.chat.completions.create(model="ours", messages=ASK, **GREEDY)
    assert answer.choices[0].message.content
    assert answer.model == "ours"
    with pytest.raises(openai.BadRequestError, match="Expected 'messages' to be an array"):
        client.post("/chat/completions", body={"model": "ours", "messages": 3}, cast_to=object)
    version = httpx.get(f"{child.url}/version").json()
    assert version["engine"] == "openai_server"


def test_a_child_that_dies_is_told_and_the_runtime_lives(embedded_model: Path, child: Served) -> None:
    server = next(
        process
        for process in psutil.Process(child.process.pid).children(recursive=True)
        if process.cmdline()[1:2] == [str(FAKES / "llama_server.py")]
    )
    server.kill()
    deadline = time.monotonic() + 20
    while (answer := httpx.post(f"{child.url}/v1/completions", json={"prompt": "x"})).status_code != 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answer.json()["error"]["type"] == "service_unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    assert child.process.poll() is None
    child.terminate()
    assert child.exit_code() == 0


def test_a_server_elsewhere_may_come_back(port: int) -> None:
    flags = ["--engine", "openai_server", "--server_url", f"http://127.0.0.1:{port}", "--model_name", "ours"]
    arguments = Served.fake_arguments()
    with Served(arguments, http_port=port) as remote, Served(["-m", "aim_runtime", *flags]) as front:
        assert httpx.post(f"{front.url}/v1/completions", json={"prompt": "x"}).status_code == 200
        remote.process.kill()
        remote.process.wait()
        refused = httpx.post(f"{front.url}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unreachable")
        front.wait_status("/v2/health/ready", 503)
        assert "cannot be reached" in httpx.post(f"{front.url}/v1/completions", json={"prompt": "x"}).text
        assert httpx.get(f"{front.url}/healthz").status_code == 200  # a new pod would not help
        with Served(arguments, http_port=port):
            front.wait_status("/v2/health/ready", 200)
            assert httpx.post(f"{front.url}/v1/completions", json={"prompt": "x"}).status_code == 200
