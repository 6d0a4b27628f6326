"""The stock OpenAI client and curl against our routes over the fake engine."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import orjson
import pytest

from fake_engine import words
from served import Served

ASK = [{"role": "user", "content": "one two three"}]
PREFIXES = ["v1", "openai/v1"]


@pytest.fixture(scope="module", params=PREFIXES)
def client(fake: Served, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fake.url}/{request.param}", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def asynchronous(fake: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{fake.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=ASK, max_tokens=4)
    assert answer.choices[0].message.content == "".join(words(4))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 4, 7)
    assert answer.id.startswith("chatcmpl-")


def test_streamed_chat_with_usage(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="m", messages=ASK, max_tokens=5, stream=True, stream_options=options)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "".join(words(5))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions(client: openai.OpenAI) -> None:
    assert client.completions.create(model="m", prompt="a b", max_tokens=3).choices[0].text == "".join(words(3))
    chunks = list(client.completions.create(model="m", prompt="a b", max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "".join(words(3))


def test_models(client: openai.OpenAI) -> None:
    listed = client.models.list()
    assert [model.id for model in listed] == ["m"]
    one = client.models.retrieve("m")
    assert (one.id, one.object) == ("m", "model")
    assert one.created > 1_700_000_000


def test_models_answer_kserve_and_openai_in_one_body(fake: Served) -> None:
    body = httpx.get(f"{fake.url}/v1/models").json()
    assert body["object"] == "list"
    assert body["models"] == ["m"]
    assert body["data"][0]["max_model_len"] == 1000
    card = httpx.get(f"{fake.url}/v1/models/m").json()
    assert card["id"] == card["name"] == "m"
    assert card["ready"] is True


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist; this server has: m") as caught:
        client.chat.completions.create(model="gpt-4", messages=ASK)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_an_endpoint_the_model_lacks_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="model m does not support embeddings") as caught:
        client.embeddings.create(model="m", input="x")
    assert (caught.value.code, caught.value.param) == ("unsupported_endpoint", "model")
    with pytest.raises(openai.BadRequestError, match="does not support responses"):
        client.responses.create(model="m", input="x")


async def test_asynchronous_client(asynchronous: openai.AsyncOpenAI) -> None:
    answer = await asynchronous.chat.completions.create(model="m", messages=ASK, max_tokens=2)
    assert answer.choices[0].message.content == "".join(words(2))
    stream = await asynchronous.chat.completions.create(model="m", messages=ASK, max_tokens=2, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "".join(words(2))


def test_curl_without_a_content_type(fake: Served) -> None:
    command = ["curl", "-s", f"{fake.url}/v1/chat/completions", "-d", orjson.dumps({"messages": ASK}).decode()]
    answer = orjson.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert answer["choices"][0]["message"]["content"] == "".join(words(16))


def test_raw_events_end_in_done(fake: Served) -> None:
    body = {"messages": ASK, "max_tokens": 2, "stream": True}
    answer = httpx.post(f"{fake.url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert len(events) == 4 + 2  # role, two tokens, finish; [DONE], the end


@pytest.mark.parametrize(("order", "code"), [("refuse_after", "engine_gave_up"), ("fail_after", None)])
def test_a_stream_that_fails_ends_in_an_error_event_and_done(fake: Served, order: str, code: str | None) -> None:
    body = {"messages": ASK, "stream": True, "fake": {order: 2}}
    *_, error, done, end = httpx.post(f"{fake.url}/v1/chat/completions", json=body).text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    refusal = orjson.loads(error.removeprefix("data: "))["error"]
    assert refusal["code"] == code
    assert "unforeseen" not in error


def test_an_unforeseen_error_is_a_500_that_keeps_the_connection(fake: Served) -> None:
    with httpx.Client(base_url=fake.url) as client:
        answer = client.post("/v1/chat/completions", json={"messages": ASK, "fake": {"fail_after": 0}})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "unforeseen" not in answer.text
        assert client.post("/v1/chat/completions", json={"messages": ASK}).status_code == 200


def test_bodies_and_headers_reach_the_engine_as_received(fake: Served) -> None:
    body = {"model": "m", "odd": {"deep": [1, None, 2.5]}, "stream": False}
    headers = {"x-custom": "Kept", "authorization": "Bearer t"}
    answer = httpx.post(f"{fake.url}/v1/fake/echo", json=body, headers=headers).json()
    assert answer["body"] == body
    assert answer["headers"].items() >= headers.items()


def test_tokenize_is_also_at_the_root(fake: Served) -> None:
    for path in ("/tokenize", "/v1/tokenize"):
        assert httpx.post(fake.url + path, json={"prompt": "a b c"}).json()["count"] == 3
    refusal = httpx.post(f"{fake.url}/detokenize", json={"tokens": [1]})
    assert refusal.status_code == 400
    assert refusal.json()["error"]["code"] == "unsupported_endpoint"


def test_request_ids_are_unique_in_the_engine_and_kept_for_the_client(fake: Served) -> None:
    headers = {"x-request-id": "mine", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    answers = [httpx.post(f"{fake.url}/v1/fake/echo", json={}, headers=headers) for _ in range(2)]
    assert [answer.headers["x-request-id"] for answer in answers] == ["mine", "mine"]
    ids = [answer.json()["request_id"] for answer in answers]
    assert all(item.startswith("mine-") for item in ids)
    assert len(set(ids)) == 2
