"""The main job as ``make run`` serves it, called by the clients people already have."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import numpy as np
import openai
import pytest
import tritonclient.http as triton_http
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

from aim_runtime.stack import Stack, running
from ports import free_ports

pytestmark = pytest.mark.model

# Put together here so that no scanner takes this file for a leak.
KEY = "AKIA" + "3XPZ7QKLMN2VWTYB"
CARD = "4111 1111 1111 1111"
FAKES = Path(__file__).parent.parent / "fakes"


@pytest.fixture(scope="module")
def stack(embedded_model: Path) -> Iterator[Stack]:
    http, grpc, runtime_http, runtime_grpc = free_ports(4)
    stack = Stack(
        model_name="smollm2",
        model_dir=str(embedded_model.parent),
        host="127.0.0.1",
        http_port=http,
        grpc_port=grpc,
        runtime_http_port=runtime_http,
        runtime_grpc_port=runtime_grpc,
        policy=None,
    )
    with running(stack, show_logs=False):
        yield stack


@pytest.fixture(scope="module", params=["v1", "openai/v1"])
def client(stack: Stack, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/{request.param}", api_key="none", max_retries=0) as client:
        yield client


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=ask("Say hello."), max_tokens=12)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 12


def test_openai_stream_with_usage_equals_unary(client: openai.OpenAI) -> None:
    body = {"model": "smollm2", "messages": ask("Name three fruits."), "max_tokens": 24, "temperature": 0}
    unary = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == unary.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("length", "stop")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == unary.usage.completion_tokens


def test_openai_json_schema_answer_parses(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smollm2",
        messages=ask("A person as JSON."),
        max_tokens=80,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_openai_embeddings_are_vectors_or_a_clear_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="smollm2", input="text")


def test_openai_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_leaked_key_is_blocked_and_never_repeated(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="smollm2", messages=ask(f"aws_access_key_id = {KEY}"))
    error = refused.value.body
    assert isinstance(error, dict)
    assert error["type"] == "content_filter"
    assert "secrets" in str(error["message"])
    assert KEY not in refused.value.response.text


def test_personal_data_never_reaches_the_model(stack: Stack) -> None:
    """The model repeats its prompt: what it was given shows in the echo."""
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        prompt = f"My card is {CARD}, mail jane.doe@example.com."
        answer = client.completions.create(model="smollm2", prompt=prompt, max_tokens=1, extra_body={"echo": True})
    text = answer.choices[0].text
    assert CARD not in text
    assert "jane.doe@example.com" not in text
    assert "<CREDIT_CARD_1>" in text


def test_triton_http(stack: Stack) -> None:
    # Whose answers leave no doubt: those of others depend on what else is computed at the time.
    prompts = np.array([b"1, 2, 3, 4, 5,", b"Monday, Tuesday,"], dtype=np.object_)
    tensor = triton_http.InferInput("prompt", [2], "BYTES")
    tensor.set_data_from_numpy(prompts, binary_data=False)
    with triton_http.InferenceServerClient(f"127.0.0.1:{stack.http_port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("smollm2")
        answer = client.infer("smollm2", [tensor], parameters={"max_tokens": 6, "temperature": 0})
        binary = triton_http.InferInput("prompt", [2], "BYTES")
        binary.set_data_from_numpy(prompts, binary_data=True)
        again = client.infer("smollm2", [binary], parameters={"max_tokens": 6, "temperature": 0})
    assert answer.as_numpy("text").shape == (2,)
    assert list(answer.as_numpy("text")) == list(again.as_numpy("text"))
    assert b"6, 7" in answer.as_numpy("text")[0]


def test_triton_grpc(stack: Stack) -> None:
    calls = [
        {"ask": "is_model_ready", "arguments": ["smollm2"]},
        {"infer": {"model": "smollm2", "prompts": ["Once upon", "The sky"], "parameters": {"max_tokens": 6}}},
    ]
    lines = "".join(json.dumps(call) + "\n" for call in calls)
    command = [sys.executable, str(FAKES / "triton_grpc_client.py"), f"127.0.0.1:{stack.grpc_port}"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    ready, answer = map(json.loads, done.stdout.splitlines())
    assert ready is True
    assert len(answer["text"]) == 2
    assert all(answer["text"])


def test_kserve_v1_and_v2(stack: Stack) -> None:
    async def both() -> tuple[object, object]:
        v1 = InferenceRESTClient(RESTConfig(protocol="v1"))
        v2 = InferenceRESTClient(RESTConfig(protocol="v2"))
        body = {"instances": ["Once upon", {"prompt": "The sky", "max_tokens": 4}], "parameters": {"max_tokens": 6}}
        first = await v1.infer(stack.url, body, model_name="smollm2")
        tensor = InferInput("prompt", [1], "BYTES", data=["Once upon"])
        request = InferRequest("smollm2", [tensor], parameters={"max_tokens": 6})
        second = await v2.infer(stack.url, request, model_name="smollm2")
        await v1.close()
        await v2.close()
        return first, second

    v1_answer, v2_answer = asyncio.run(both())
    text, detailed = v1_answer["predictions"]
    assert isinstance(text, str)
    assert detailed["text"]
    assert v2_answer.outputs[0].name == "text"
    assert v2_answer.outputs[0].shape == [1]


def test_curl_as_printed(stack: Stack) -> None:
    body = json.dumps({"model": "smollm2", "messages": ask("Hi"), "max_tokens": 5, "stream": True})
    command = ["curl", "-sN", f"{stack.url}/v1/chat/completions", "-H", "content-type: application/json", "-d", body]
    events = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events)
