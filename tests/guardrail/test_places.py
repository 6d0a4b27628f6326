"""Where a text stands: what its key says of it, its neighbours, and the places that hold none."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from fake_predictor import FakePredictor
from guarded import ask, orders
from served import Served

KEY = "AKIA" + "3XPZ7QKLMN2VWTYB"
CARD = "4111 1111 1111 1111"
MAIL = "jane.doe@example.com"
PASSWORD = "hunter2-Xy7!qPz"
AWS = "wJalrXUtnFEMI7K9MDENG" + "bPxRfiCYzQ4b8d1eTuk"
PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA" + "A" * 60


def sent(predictor: FakePredictor) -> Any:
    return orjson.loads(predictor.last["body"])


def blocked(answer: httpx.Response) -> str:
    """Which field a refusal names."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    if isinstance(error, str):
        return error.split()[0]
    assert error["code"] == "content_filter", error
    return error["param"]


# --- a key is context for its value ---------------------------------------------------------------------------------

NAMED = {"password": PASSWORD, "aws_secret_access_key": AWS}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/chat/completions", {**ask("hi"), "metadata": "%"}, "metadata."),
        ("/v1/chat/completions", {**ask("hi"), "chat_template_kwargs": {"a": ["%"]}}, "chat_template_kwargs.a[0]."),
        ("/v1/responses", {"input": "hi", "prompt": {"id": "p", "variables": "%"}}, "prompt.variables."),
        ("/v1/models/m:predict", {"instances": [["%"]]}, "instances[0][0]."),
        ("/v1/models/m:predict", {"instances": ["x"], "parameters": "%"}, "parameters."),
        ("/v2/models/m/infer", {"inputs": [], "parameters": "%"}, "parameters."),
        ("/tokenize", {"prompt": "x", "env": "%"}, "env."),
    ],
)
def test_a_key_is_context_for_its_value(
    client: httpx.Client, name: str, path: str, body: dict[str, Any], where: str
) -> None:
    value = orjson.dumps({name: NAMED[name]}).decode()
    answer = client.post(path, content=orjson.dumps(body).decode().replace('"%"', value))
    assert blocked(answer) == where + name
    assert NAMED[name] not in answer.text


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "object"])
def test_a_key_is_context_for_its_value_in_a_tools_arguments(client: httpx.Client, as_text: bool) -> None:
    said = {**NAMED, "who": "root", "port": 5432}
    arguments = orjson.dumps(said).decode() if as_text else said
    answer = client.post(
        "/v1/chat/completions", json=ask("hi"), headers=orders(message={"tool_calls": [call(arguments)]})
    )
    shown = answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    hidden = {"password": "<SECRET_1>", "aws_secret_access_key": "<SECRET_2>", "who": "root", "port": 5432}
    assert (orjson.loads(shown) if as_text else shown) == hidden
    asked = {"messages": [{"role": "assistant", "tool_calls": [call(arguments)]}]}
    field = "messages[0].tool_calls[0].function.arguments.password"
    assert blocked(client.post("/v1/chat/completions", json=asked)) == field


@pytest.mark.parametrize(
    "said",
    [
        {"name": "DB_PASSWORD", "value": PASSWORD},
        {"key": "password", "values": ["x", PASSWORD]},
        {"name": "password", "datatype": "BYTES", "shape": [1], "data": [PASSWORD]},
    ],
)
def test_a_name_beside_a_value_is_context_for_it(client: httpx.Client, said: dict[str, Any]) -> None:
    assert client.post("/v1/models/m:predict", json={"instances": [said]}).status_code == 400


def test_a_tensors_name_is_context_for_its_elements(client: httpx.Client) -> None:
    raw = len(PASSWORD).to_bytes(4, "little") + PASSWORD.encode()
    tensor = {"name": "password", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = orjson.dumps({"inputs": [tensor]})
    headers = {"inference-header-content-length": str(len(head))}
    assert blocked(client.post("/v2/models/m/infer", content=head + raw, headers=headers)) == "password[0]"


def test_the_protocols_own_keys_say_nothing_of_their_values(client: httpx.Client, predictor: FakePredictor) -> None:
    body = {**ask("hi"), "prompt_cache_key": "user-7f3a9c21-abc", "safety_identifier": "a1b2c3d4e5f6", "model": "m"}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert sent(predictor) == body


# --- neighbours -----------------------------------------------------------------------------------------------------


def parts(*texts: str, kind: str = "text") -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for text in texts]


@pytest.mark.parametrize("cut", range(1, len(CARD)))
def test_text_parts_next_to_each_other_are_one_text(client: httpx.Client, predictor: FakePredictor, cut: int) -> None:
    content = parts(f"mail {MAIL} card {CARD[:cut]}", "", f"{CARD[cut:]} now")
    body = {"messages": [{"role": "user", "content": content}]}
    client.post("/v1/chat/completions", json=body, headers=orders(say="ok"))
    shown = [part["text"] for part in sent(predictor)["messages"][0]["content"]]
    assert shown == ["mail <EMAIL_ADDRESS_1> card <CREDIT_CARD_1>", "", " now"]


def test_a_value_over_many_parts_is_one(client: httpx.Client, predictor: FakePredictor) -> None:
    item = {"type": "message", "role": "user", "content": parts("to ", *CARD.split(" "), "!", kind="input_text")}
    for text in item["content"][1:5]:
        text["text"] += " "
    client.post("/v1/responses", json={"input": [item]}, headers=orders(say="ok"))
    shown = [part["text"] for part in sent(predictor)["input"][0]["content"]]
    assert shown == ["to ", "<CREDIT_CARD_1>", "", "", " ", "!"]


def test_a_part_hides_no_value_in_its_neighbour(client: httpx.Client) -> None:
    """Joined with `abc` the key is none; alone it is."""
    content = parts(f"use {KEY}", "abc")
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert blocked(answer) == "messages[0].content[0].text"


def test_what_stands_apart_is_not_joined(client: httpx.Client, predictor: FakePredictor) -> None:
    picture = {"type": "image_url", "image_url": {"url": PNG}}
    content = [*parts(CARD[:9]), picture, *parts(CARD[9:])]
    messages = [{"role": "user", "content": content}, {"role": "user", "content": CARD[:9]}]
    messages.append({"role": "user", "content": CARD[9:]})
    client.post("/v1/chat/completions", json={"messages": messages}, headers=orders(say="ok"))
    assert sent(predictor) == {"messages": messages}


# --- places without text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/chat/completions", {**ask("hi"), "metadata": {"id": "%"}}, "metadata.id"),
        ("/v1/responses", {"input": "x", "prompt": {"id": "p", "variables": {"id": "%"}}}, "prompt.variables.id"),
        ("/v1/chat/completions", {**ask("hi"), "documents": [{"id": "%", "text": "x"}]}, "documents[0].id"),
        (
            "/v1/chat/completions",
            {**ask("hi"), "chat_template_kwargs": {"role": "%"}},
            "chat_template_kwargs.role",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "%", "content": "x"}]}, "messages[0].role"),
        ("/v1/chat/completions", {**ask("hi"), "tools": [{"type": "%"}]}, "tools[0].type"),
        ("/v1/embeddings", {"input": "x", "extra": {"model": "%"}}, "extra.model"),
    ],
)
def test_no_key_is_skipped_by_its_name(client: httpx.Client, path: str, body: dict[str, Any], where: str) -> None:
    answer = client.post(path, content=orjson.dumps(body).decode().replace("%", KEY))
    assert blocked(answer) == where


def test_ids_roles_and_types_in_their_places_are_left_alone(client: httpx.Client, predictor: FakePredictor) -> None:
    identifier = "call_4111111111111111"
    message = {"role": "tool", "tool_call_id": identifier, "content": "x"}
    schema = {"type": "object", "properties": {"password": {"type": "string"}}, "required": ["password"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {"messages": [message], "tools": [tool], "model": "org/Model-8B-Instruct:v1.0.0.1"}
    assert client.post("/v1/chat/completions", json=body, headers=orders(say="ok")).status_code == 200
    assert sent(predictor) == body


# --- what is no text, and what only says so -------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [["a", [1, 2, 3]], [[], [1, 2, 3]], [["a"], 7], [["a", 7]]])
@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
def test_token_ids_are_refused_wherever_they_stand(
    client: httpx.Client, predictor: FakePredictor, path: str, field: str, prompt: list[Any]
) -> None:
    before = len(predictor.seen)
    answer = client.post(path, json={"model": "m", field: prompt})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert len(predictor.seen) == before


@pytest.mark.parametrize(
    "body",
    [
        ask(f"data:image/png;base64,{KEY}"),
        {"messages": [{"role": "user", "content": parts(f"data:image/png;base64,{KEY}")}]},
        {**ask("x"), "documents": [f"data:image/png;base64,{KEY}"]},
    ],
)
def test_a_text_that_says_it_is_a_picture_is_checked(client: httpx.Client, body: dict[str, Any]) -> None:
    assert blocked(client.post("/v1/chat/completions", json=body))


def test_pictures_pass_where_there_may_be_any(client: httpx.Client, predictor: FakePredictor) -> None:
    body = {"instances": [{"image": PNG, "b": [PNG]}]}
    assert client.post("/v1/models/m:predict", json=body).status_code == 200
    assert sent(predictor) == body


@pytest.mark.parametrize("query", [f"note={MAIL}", f"a=1&note=to+{MAIL.replace('@', '%40')}", f"{MAIL}=1", MAIL])
def test_a_query_string_is_checked(client: httpx.Client, predictor: FakePredictor, query: str) -> None:
    client.post(f"/v1/chat/completions?{query}", json=ask("hi"))
    path = predictor.last["path"]
    assert "example.com" not in path
    assert "EMAIL_ADDRESS_1" in path
    assert ("a=1" in path) == ("a=1" in query)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_secret_in_a_query_string_is_refused(
    client: httpx.Client, predictor: FakePredictor, transformer: Served, method: str
) -> None:
    before = len(predictor.seen)
    answer = client.request(method, "/v1/files", params={"n": "1", "password": PASSWORD})
    assert blocked(answer) == "query.password"
    assert len(predictor.seen) == before
