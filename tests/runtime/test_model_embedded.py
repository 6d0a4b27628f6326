"""The whole runtime with a real model: ``python -m aim_runtime`` over the embedded one, stock clients."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import httpx
import jsonschema
import numpy as np
import openai
import pytest
import tritonclient.http as triton
from prometheus_client.parser import text_string_to_metric_families

from served import Served

pytestmark = pytest.mark.model

ASK = [{"role": "user", "content": "Name three fruits."}]


@pytest.fixture
def client(real: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_streamed_and_whole_answers_are_equal(client: openai.OpenAI) -> None:
    body = {"model": "smollm2", "messages": ASK, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 16
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 5


def test_json_schema_answer_parses(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"fruit": {"type": "string", "maxLength": 10}, "count": {"type": "integer"}},
        "required": ["fruit", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model="smollm2", messages=ASK, max_tokens=80, temperature=0, response_format=wanted
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_an_endpoint_the_model_lacks_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="smollm2 does not support embeddings"):
        client.embeddings.create(model="smollm2", input="x")


def test_v1_and_v2_answer_the_same_text(client: openai.OpenAI, real: Served) -> None:
    # Sure answers: rows of a batch are added up in another order than a row alone, and near ties would flip.
    prompts = ["The capital of France is", "1, 2, 3, 4, 5, 6,"]
    parameters = {"max_tokens": 2, "temperature": 0}
    whole = [
        client.completions.create(model="smollm2", prompt=prompt, **parameters).choices[0].text for prompt in prompts
    ]
    body = {"instances": prompts, "parameters": parameters}
    v1 = httpx.post(f"{real.url}/v1/models/smollm2:predict", json=body, timeout=60).json()
    assert v1 == {"predictions": whole}
    with triton.InferenceServerClient(f"127.0.0.1:{real.http_port}", network_timeout=60) as v2:
        tensor = triton.InferInput("prompt", [2], "BYTES")
        tensor.set_data_from_numpy(np.array(prompts, dtype=object))
        answer = v2.infer("smollm2", [tensor], parameters=parameters)
    assert [item.decode() for item in answer.as_numpy("text")] == whole


async def test_broken_streams_free_their_slots(real: Served) -> None:
    body = {"model": "smollm2", "messages": ASK, "max_tokens": 500, "stream": True}
    async with httpx.AsyncClient(base_url=real.url, timeout=60) as client:

        async def break_off() -> None:
            async with client.stream("POST", "/v1/chat/completions", json={**body, "ignore_eos": True}) as stream:
                lines = stream.aiter_lines()
                await anext(lines)
                await lines.aclose()

        await asyncio.gather(*(break_off() for _ in range(12)))  # four run, eight wait
        started = time.perf_counter()
        while await _busy(client):
            assert time.perf_counter() - started < 5
        answer = await client.post("/v1/chat/completions", json={**body, "stream": False, "max_tokens": 2})
        assert answer.status_code == 200


async def _busy(client: httpx.AsyncClient) -> float:
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    wanted = ("aim_requests_running", "aim_requests_waiting")
    return sum(sample.value for family in families for sample in family.samples if sample.name in wanted)


def test_max_model_len_is_what_was_asked_for(client: openai.OpenAI) -> None:
    assert client.models.retrieve("smollm2").model_extra["max_model_len"] == 1024
    with pytest.raises(openai.BadRequestError, match="1024"):
        client.completions.create(model="smollm2", prompt="word " * 1100, max_tokens=1)
