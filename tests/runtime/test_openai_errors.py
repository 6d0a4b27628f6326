"""Bad input is a 4xx in OpenAI's shape that names the field, over the fake engine and (values) the embedded one."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from served import Served

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "hi"}]


def refusal(server: Served, path: str, **request: Any) -> tuple[int, dict[str, Any]]:
    answer = httpx.post(server.url + path, timeout=60, **request)
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return answer.status_code, error


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"messages": [', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b'"text"', "must be a JSON object, not str"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
    ],
)
def test_malformed_bodies(fake: Served, content: bytes, says: str) -> None:
    status, error = refusal(fake, CHAT, content=content)
    assert status == 400
    assert says in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_json")


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"model": 5}, 400, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x " * 1001}]}, 400, "prompt"),
    ],
)
def test_wrong_fields_are_named(fake: Served, change: dict[str, Any], status: int, param: str) -> None:
    for stream in (False, True):  # validated before the stream begins: never an error inside a 200
        answered, error = refusal(fake, CHAT, json={"model": "m", "messages": ASK, "stream": stream, **change})
        assert (answered, error["param"]) == (status, param)


@pytest.mark.model
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": ["x"]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": 5}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}}, "response_format"),
        ({"tools": "hammer"}, "tools"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_fields_are_named_by_the_embedded_engine(real: Served, change: dict[str, Any], field: str) -> None:
    body = {"model": "smollm2", "messages": ASK, "max_tokens": 2, **change}
    status, error = refusal(real, CHAT, json=body)
    assert status in (400, 422)
    assert error["type"] == "invalid_request_error"
    assert field in f"{error['param']} {error['message']}"


def test_too_large_a_body_is_refused_before_it_is_parsed(fake: Served) -> None:
    body = b" " * (32 * 1024**2 + 1)
    status, error = refusal(fake, CHAT, content=body)
    assert status == 413
    assert "--max_body_mib" in error["message"]
    for path in ("/v1/models/m:predict", "/v2/models/m/infer"):
        answer = httpx.post(fake.url + path, content=body, timeout=60)
        assert answer.status_code == 413
        assert "--max_body_mib" in answer.json()["error"]


def test_unknown_routes(fake: Served) -> None:
    status, error = refusal(fake, "/v1/chat/complete", json={})
    assert (status, error["type"]) == (404, "invalid_request_error")
    assert "POST /v1/chat/complete" in error["message"]
    answer = httpx.get(fake.url + CHAT)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path",
    [
        "/v1Xchat/completions",
        "/v1-chat/completions",
        "/openai/v1zcompletions",
        "/v1%2Fchat/completions",
        "/v1/chat%2fcompletions",
        "/v1//chat/completions",
        "/v1/chat/completions/",
        "/V1/chat/completions",
        "/openaiXv1/chat/completions",
        "/openai/chat/completions",
        "/v1%2ftokenize",
        "/%74okenize",
    ],
)
def test_only_the_exact_path_is_served(fake: Served, path: str) -> None:
    """A gateway's path policy must not be passed by another spelling of the same route."""
    answer = httpx.post(fake.url + path, json={"messages": ASK, "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 404, path


def test_a_full_engine_is_a_503_with_retry_after() -> None:
    with Served.fake(slots=1, max_waiting=0, token_s=0.05) as server, httpx.Client(base_url=server.url) as client:
        with client.stream("POST", CHAT, json={"messages": ASK, "stream": True, "max_tokens": 40}) as running:
            lines = running.iter_lines()
            next(lines)
            busy = client.post(CHAT, json={"messages": ASK})
        assert busy.status_code == 503
        assert int(busy.headers["retry-after"]) >= 1
        assert busy.json()["error"]["code"] == "engine_full"


def test_a_dead_engine_is_a_503_everywhere() -> None:
    with Served.fake() as server:
        status, error = refusal(server, CHAT, json={"messages": ASK, "fake": {"die": True}})
        assert (status, error["code"]) == (503, "engine_dead")
        answer = httpx.post(server.url + CHAT, json={"messages": ASK})
        assert answer.status_code == 503
        assert "the fake engine of model m has died" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
        for path in ("/v2/health/ready", "/v2/health/live", "/v2/models/m/ready", "/v1/models/m"):
            assert httpx.get(server.url + path).status_code == 503, path
        assert httpx.post(f"{server.url}/v1/models/m:predict", json={"instances": ["x"]}).status_code == 503


def test_an_answer_that_json_has_no_form_for_is_an_error_without_a_trace(fake: Served) -> None:
    deep = b"[" * 400 + b"1" + b"]" * 400
    before = fake.stderr()
    answer = httpx.post(f"{fake.url}/v1/fake/echo", content=b'{"model":"m","x":%s}' % deep)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "answer_unsendable")
    assert "Traceback" not in fake.stderr().removeprefix(before)
