"""KServe's V1 protocol: an answer in the form of each instance; the stock KServe client."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from kserve import InferenceRESTClient, RESTConfig

from fake_engine import words
from served import Served

PREDICT = "/v1/models/m:predict"
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def test_answers_have_the_form_of_their_instances(fake: Served) -> None:
    body = {
        "instances": ["x", {"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}],
        "parameters": {"max_tokens": 2, "temperature": 0},
    }
    answer = httpx.post(fake.url + PREDICT, json=body)
    two, three = "".join(words(2)), "".join(words(3))
    plain, completed, chatted = answer.json()["predictions"]
    assert plain == two
    assert completed == {"text": two, "finish_reason": "length", "usage": USAGE}
    assert chatted["text"] == three  # an instance's own parameters win over the shared ones


def test_a_batch_runs_at_once(fake: Served) -> None:
    many = [{"prompt": str(index), "max_tokens": index + 1} for index in range(20)]
    answers = httpx.post(fake.url + PREDICT, json={"instances": many}).json()["predictions"]
    assert [answer["text"] for answer in answers] == ["".join(words(index + 1)) for index in range(20)]


def test_a_batch_larger_than_the_engine_waits_its_turn() -> None:
    with Served.fake(slots=2, max_waiting=14) as server:
        body = {"instances": ["x"] * 200, "parameters": {"max_tokens": 1}}
        assert len(httpx.post(server.url + PREDICT, json=body).json()["predictions"]) == 200


def test_more_instances_than_anyone_batches_are_refused_by_their_number(fake: Served) -> None:
    answer = httpx.post(fake.url + PREDICT, json={"instances": ["x"] * 300_000})
    assert answer.status_code == 400
    assert "300000 prompts" in answer.json()["error"]


def test_more_values_than_any_model_reads_are_refused_unparsed(fake: Served) -> None:
    body = b'{"instances": [' + b"[]," * 2_100_000 + b"1]}"
    answer = httpx.post(fake.url + PREDICT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "commas" in answer.json()["error"]


async def test_kserve_client(fake: Served) -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v1"))
    answer = await client.infer(fake.url, {"instances": ["x"], "parameters": {"max_tokens": 2}}, model_name="m")
    assert answer == {"predictions": ["".join(words(2))]}
    assert await client.is_model_ready(fake.url, "m")
    await client.close()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ([1], "must be an object"),
        ({}, "instances: must be a non-empty list"),
        ({"instances": []}, "instances: must be a non-empty list"),
        ({"instances": "x"}, 'Expected "instances" to be a list'),  # KServe looks first
        ({"instances": ["x", 5]}, "instances[1]: must be a string or an object, not a number"),
        ({"instances": [{}]}, "instances[0]: give either prompt or messages"),
        ({"instances": [{"prompt": "x", "messages": []}]}, "instances[0]: give either prompt or messages"),
        ({"instances": [{"prompt": ["x"]}]}, "instances[0].prompt: must be a string, not a list"),
        ({"instances": [{"prompt": "x", "temprature": 1}]}, "instances[0].temprature: unknown parameter"),
        ({"instances": ["x"], "parameters": {"stream": True}}, "parameters.stream: unknown parameter"),
        ({"instances": ["x"], "parameters": {"stream": True}}, "use the OpenAI routes"),
        ({"instances": ["x"], "parameters": {"temprature": 1}}, "did you mean temperature?"),
        (
            {"instances": [{"messages": []}, "x"], "parameters": {"chat_template_kwargs": {}}},
            "instances[1]: parameters.chat_template_kwargs: unknown parameter",
        ),
        ({"instances": ["x"], "parameters": [1]}, "parameters: must be an object, not a list"),
        ({"instances": ["x"], "params": {}}, "params: unknown field"),
        ({"instances": ["x", {"prompt": "y", "temperature": -1}]}, "instances[1]: temperature: must be"),
        ({"instances": ["x"], "parameters": {"max_tokens": "many"}}, "instances[0]: max_tokens: must be"),
    ],
)
def test_bad_input_is_named(fake: Served, body: Any, says: str) -> None:
    answer = httpx.post(fake.url + PREDICT, json=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]


@pytest.mark.parametrize("kind", ["text/plain", "application/json; charset=utf-8", "application/x-www-form-urlencoded"])
def test_json_is_read_whatever_it_is_called(fake: Served, kind: str) -> None:
    answer = httpx.post(fake.url + PREDICT, content=b'{"instances": ["x"]}', headers={"content-type": kind})
    assert answer.json() == {"predictions": ["".join(words(16))]}
    broken = httpx.post(fake.url + PREDICT, content=b'{"instances"', headers={"content-type": kind})
    assert broken.status_code == 400


def test_unknown_model(fake: Served) -> None:
    answer = httpx.post(f"{fake.url}/v1/models/other:predict", json={"instances": ["x"]})
    assert answer.status_code == 404
    assert "other" in answer.json()["error"]
