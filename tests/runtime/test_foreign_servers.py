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
import psutil
import pytest
import tritonclient.http as triton
from kserve import InferenceGRPCClient, InferInput, InferRequest

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


def streamed(client: openai.OpenAI, model: str) -> tuple[str, openai.types.CompletionUsage | None]:
    with client.chat.completions.create(
        model=model, messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {model}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text, chunks[-1].usage


def test_the_answers_are_the_servers(real: Served, front: Served, client_of: ClientOf) -> None:
    theirs, ours = client_of(real), client_of(front)
    expected = theirs.chat.completions.create(model="smollm2", messages=ASK, **GREEDY)
    got = ours.chat.completions.create(model="ours", messages=ASK, **GREEDY)
    assert got.model == "ours"
    assert got.choices == expected.choices
    text, usage = streamed(ours, "ours")
    assert text == expected.choices[0].message.content
    assert usage is not None
    assert expected.usage is not None
    assert usage.completion_tokens == expected.usage.completion_tokens


def test_refusals_are_the_servers(front: Served, client_of: ClientOf) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client_of(front).chat.completions.create(model="ours", messages=ASK, temperature=-1, stream=stream)
        assert refused.value.param == "temperature"
    answer = httpx.post(f"{front.url}/v1/chat/completions", json={"messages": ASK, **GREEDY, "unheard_of": 1})
    assert answer.status_code == 200
    assert "x-ignored-fields" not in answer.headers  # who does not know the fields cannot say what is ignored


def test_v1_and_v2_go_through_it(front: Served, real: Served, client_of: ClientOf) -> None:
    prompt = "Once upon a time"
    expected = client_of(real).completions.create(model="smollm2", prompt=prompt, **GREEDY).choices[0].text
    asked = {"instances": [prompt], "parameters": {**GREEDY, "min_p": 0.0}}
    assert httpx.post(f"{front.url}/v1/models/ours:predict", json=asked).json() == {"predictions": [expected]}
    refused = httpx.post(f"{front.url}/v1/models/ours:predict", json={**asked, "parameters": {"n": 2}})
    assert (refused.status_code, "use the OpenAI routes" in refused.text) == (400, True)

    tensor = triton.InferInput("prompt", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_))
    with triton.InferenceServerClient(front.url.removeprefix("http://")) as client:
        answer = client.infer("ours", [tensor], parameters=dict(GREEDY))
        assert answer.as_numpy("text").tolist() == [expected.encode()]


async def test_grpcs_texts_become_what_the_fields_take(front: Served, real: Served, client_of: ClientOf) -> None:
    """KServe's gRPC client cannot send a float."""
    prompt = "Once upon a time"
    expected = client_of(real).completions.create(model="smollm2", prompt=prompt, **GREEDY).choices[0].text
    tensor = InferInput("prompt", [1], "BYTES", data=[prompt])
    request = InferRequest("ours", [tensor], parameters={"max_tokens": 8, "temperature": "0.0", "stop": '["zzz"]'})
    client = InferenceGRPCClient(front.grpc_url)
    try:
        answer = await client.infer(request)
    finally:
        await client.close()
    texts = {output.name: output for output in answer.outputs}["text"]
    assert [item.decode() if isinstance(item, bytes) else item for item in texts.as_numpy().tolist()] == [expected]


def test_the_models_state_is_the_servers(front: Served, client_of: ClientOf) -> None:
    card = client_of(front).models.retrieve("ours").model_dump()
    assert card["max_model_len"] == 1024
    usage = [line for line in httpx.get(f"{front.url}/metrics").text.splitlines() if line.startswith("aim_kv_cache")]
    assert usage


def test_llama_server_as_a_child(child: Served, client_of: ClientOf) -> None:
    client = client_of(child)
    texts = {streamed(client, "ours")[0] for _ in range(3)}
    assert len(texts) == 1
    answer = client.chat.completions.create(model="ours", messages=ASK, **GREEDY)
    assert answer.choices[0].message.content in texts
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
