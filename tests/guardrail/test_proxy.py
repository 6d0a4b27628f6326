"""OpenAI's API through the transformer: what is checked, what is changed, and that nothing else is."""

from __future__ import annotations

import json

import httpx
import openai
import orjson
import pytest

from aim_guardrail.slots.collect import unescaped
from fake_predictor import FakePredictor
from guarded import ask, events, metric, orders, said
from served import Served

KEY = "AKIA" + "3XPZ7QKLMN2VWTYB"
CARD = "4111 1111 1111 1111"
MAIL = "jane.doe@example.com"


def sent_body(predictor: FakePredictor) -> dict:
    return orjson.loads(predictor.last["body"])


# --- nothing found: nothing changed ---------------------------------------------------------------------------------


def test_bodies_headers_and_status_are_preserved(client: httpx.Client, predictor: FakePredictor) -> None:
    body = b'{ "model":"m", "messages":[{"role":"user","content":"caf\\u00e9"}],\n "x_new_field": 1.50 }'
    headers = {
        **orders(headers={"x-answer": "yes", "content-type": "application/json; charset=utf-8", "set-cookie": "a=b"}),
        "authorization": "Bearer abc",
        "x-custom": "kept",
        "tracestate": "vendor=1",
        "connection": "keep-alive, x-hop",
        "x-hop": "this hop only",
        "te": "trailers",
        "x-request-id": "id-1",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    answer = client.post("/v1/chat/completions?a=1&b=%2F", content=body, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["x-answer"] == "yes"
    assert answer.headers["set-cookie"] == "a=b"
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.headers["x-guardrail-verdict"] == "allow"
    assert answer.headers["x-request-id"] == "id-1"
    assert len(answer.headers.get_list("date")) == 1

    seen = predictor.last
    assert seen["body"] == body
    assert seen["path"] == "/v1/chat/completions?a=1&b=%2F"
    got = [(key.lower(), value) for key, value in seen["headers"]]
    names = [key for key, _ in got]
    sent = dict(got)
    assert "authorization" not in sent  # see test_credentials.py
    assert sent["x-custom"] == "kept"
    assert sent["tracestate"] == "vendor=1"
    assert sent["x-request-id"] == "id-1"
    assert sent["traceparent"].startswith("00-0af7651916cd43dd8448eb211c80319c-")
    assert "b7ad6b7169203331" not in sent["traceparent"]
    assert sent["content-length"] == str(len(body))
    assert sent["host"] == predictor.host
    assert not {"x-hop", "te"} & set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (
            400,
            "application/json",
            '{"error":{"message":"bad  top_p","type":"BadRequestError","param":"top_p","code":400}}',
        ),
        (401, "application/json", '{"error":"Unauthorized"}'),
        (404, "application/json", '{"detail":"Not Found"}'),
        (422, "application/problem+json", '{ "detail": [ {"loc": ["body"]} ] }'),
        (429, "text/plain; charset=utf-8", "slow down"),
        (500, "text/html", "<h1>Internal</h1>"),
        (503, "application/json", '{"error":{"message":"loading"}}'),
        (202, "application/json", "null"),
        (200, "application/json", '["a", 1.0]'),
        (204, "application/json", ""),
        (307, "text/plain", "elsewhere"),
    ],
)
def test_any_status_and_body_comes_back(client: httpx.Client, status: int, kind: str, body: str) -> None:
    given = {"content-type": kind, "retry-after": "7", "location": "http://elsewhere/"}
    answer = client.post(
        "/v1/chat/completions", json=ask("hi"), headers=orders(status=status, body=body, headers=given)
    )
    assert answer.status_code == status
    assert answer.text == body
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["content-type"] == kind
    assert answer.headers["location"] == "http://elsewhere/"


@pytest.mark.parametrize("path", ["/v1/models", "/openai/v1/models", "/v1/models/m", "/v2/models/m", "/nothing/here"])
def test_other_routes_pass(client: httpx.Client, predictor: FakePredictor, path: str) -> None:
    answer = client.get(path)
    direct = httpx.get(f"http://{predictor.host}{path}")
    assert (answer.status_code, answer.content) == (direct.status_code, direct.content)
    assert predictor.last["path"] == path


@pytest.mark.parametrize("verb", ["load", "unload"])
@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1", "/v1%2f"])
def test_a_guarded_client_changes_no_predictor(
    client: httpx.Client, predictor: FakePredictor, prefix: str, verb: str
) -> None:
    before = len(predictor.seen)
    answer = client.post(
        f"{prefix}/{verb}%5Flora_adapter".replace("%2f/", "%2f"), json={"lora_name": "a", "lora_path": "/x"}
    )
    assert answer.status_code == 404
    assert "ask the predictor itself" in answer.json()["error"]["message"]
    assert len(predictor.seen) == before


def test_methods_pass(client: httpx.Client, predictor: FakePredictor) -> None:
    for method in ("DELETE", "PUT", "PATCH", "OPTIONS"):
        client.request(method, "/v1/responses/resp_1")
        assert predictor.last["method"] == method


def test_a_repeated_key_is_not_sent_on_twice(client: httpx.Client, predictor: FakePredictor) -> None:
    """Our parser keeps the last of two keys; a predictor's might keep the first, unchecked."""
    body = (
        f'{{"model":"m","messages":[{{"role":"user","content":"{KEY}"}}],"messages":[{{"role":"user","content":"x"}}]}}'
    )
    assert client.post("/v1/chat/completions", content=body).status_code == 200
    assert KEY.encode() not in predictor.last["body"]


REPEATED = (
    '{"choices":[{"index":0,"message":{"role":"assistant","content":"bob@example.com","content":"fine"}}]}',
    '[{"text":"bob@example.com","text":"fine"}]',
    '{"a":{"b":"bob@example.com"},"a":"fine: \\u003a"}',
)


@pytest.mark.parametrize("body", REPEATED)
def test_a_repeated_key_is_not_brought_back_twice(client: httpx.Client, body: str) -> None:
    told = orders(status=200, body=body, headers={"content-type": "application/json"})
    answer = client.post("/v1/chat/completions", json=ask("hi"), headers=told)
    assert answer.status_code == 200
    assert ("bob" in answer.text, "fine" in answer.text) == (False, True)


DELTA = 'data: {"choices":[{"index":0,"delta":{%s},"finish_reason":null}]}\n\n'


@pytest.mark.parametrize(
    "delta",
    [
        '"content":"bob@example.com","content":"fine. "',
        '"content":"bob@example.com","content":"fine\\u003a \\u00e9 "',
        '"refusal":{"a":"bob@example.com"},"refusal":null,"content":"fine "',
    ],
)
def test_a_repeated_key_is_not_streamed_twice(client: httpx.Client, delta: str) -> None:
    told = orders(raw=DELTA % delta + "data: [DONE]\n\n")
    answer = client.post("/v1/chat/completions", json=ask("hi", stream=True), headers=told)
    assert ("bob" in answer.text, "fine" in said(events(answer))) == (False, True)


def test_an_event_without_one_is_streamed_as_it_came(client: httpx.Client) -> None:
    raw = DELTA % '"content" : "caf\\u00e9: it " , "role":"assistant"'
    answer = client.post(
        "/v1/chat/completions", json=ask("hi", stream=True), headers=orders(raw=raw + "data: [DONE]\n\n")
    )
    assert answer.text.startswith(raw)


def test_a_path_is_sent_on_as_it_came(client: httpx.Client, predictor: FakePredictor) -> None:
    client.get("/v1/files/bob%40example.com")
    assert predictor.last["path"] == "/v1/files/bob%40example.com"


LARGE = (2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**30 + 1, 7)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models/m:predict"])
def test_integers_of_any_size_are_kept_where_a_body_is_written_anew(
    client: httpx.Client, predictor: FakePredictor, path: str
) -> None:
    numbers = ",".join(map(str, LARGE))
    texts = f'"messages":[{{"content":"to {MAIL}"}}],"instances":["{MAIL}"]'
    body = f'{{{texts},"x":[{numbers}],"y":{{"z":0.1234567890123456789}}}}'
    told = orders(status=200, body=body, headers={"content-type": "application/json"})
    answer = client.post(path, content=body, headers=told)
    for text in (predictor.last["body"].decode(), answer.text):
        assert MAIL not in text
        assert f'"x":[{numbers}]' in text
        assert json.loads(text)["y"]["z"] == 0.1234567890123456789


def test_integers_of_any_size_are_kept_in_arguments_tensors_and_streams(
    client: httpx.Client, predictor: FakePredictor
) -> None:
    number = str(10**30 + 1)
    call = {"id": "1", "function": {"name": "f", "arguments": f'{{"to": "{MAIL}", "n": {number}}}'}}
    client.post("/v1/chat/completions", json={"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert f'\\"n\\":{number}' in predictor.last["body"].decode()
    head = f'{{"inputs":[],"parameters":{{"a":"{MAIL}","n":{number}}}}}'.encode()
    client.post("/v2/models/m/infer", content=head, headers={"inference-header-content-length": str(len(head))})
    assert f'"n":{number}'.encode() in predictor.last["body"]
    chunk = f'data: {{"choices":[{{"index":0,"delta":{{"content":"to {MAIL} "}}}}],"usage":{{"n":{number}}}}}\n\n'
    answer = client.post(
        "/v1/chat/completions", json=ask("x", stream=True), headers=orders(raw=chunk + "data: [DONE]\n\n")
    )
    assert MAIL not in answer.text
    assert f'"n":{number}' in answer.text


def test_a_large_body_passes_unchanged(client: httpx.Client, predictor: FakePredictor) -> None:
    body = orjson.dumps(ask("all quiet here. " * 80_000))
    answer = client.post("/v1/chat/completions", content=body, headers=orders(say="ok"))
    assert answer.status_code == 200
    assert len(body) > 2**20
    assert predictor.last["body"] == body


# --- prompts --------------------------------------------------------------------------------------------------------


PROMPTS = {
    "content": ({"messages": [{"role": "user", "content": "%s"}]}, "messages[0].content"),
    "system": (
        {"messages": [{"role": "system", "content": "%s"}, {"role": "user", "content": "x"}]},
        "messages[0].content",
    ),
    "history": (
        {"messages": [{"role": "assistant", "content": "%s"}, {"role": "user", "content": "x"}]},
        "messages[0].content",
    ),
    "tool result": (
        {"messages": [{"role": "tool", "tool_call_id": "1", "content": "%s"}, {"role": "user", "content": "x"}]},
        "messages[0].content",
    ),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "%s"}]}]},
        "messages[0].content[1].text",
    ),
    "tool call": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"id":"%s"}'}}],
                },
                {"role": "user", "content": "x"},
            ]
        },
        "messages[0].tool_calls[0].function.arguments.id",
    ),
    "tool": (
        {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"type": "function", "function": {"name": "f", "description": "%s", "parameters": {}}}],
        },
        "tools[0].function.description",
    ),
    "template": (
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"documents": [["%s"]]}},
        "chat_template_kwargs.documents[0][0]",
    ),
}


@pytest.mark.parametrize(("body", "param"), PROMPTS.values(), ids=PROMPTS.keys())
def test_a_secret_anywhere_in_a_prompt_blocks(
    client: httpx.Client, predictor: FakePredictor, body: dict, param: str
) -> None:
    count = len(predictor.seen)
    text = orjson.dumps({"model": "m", **body}).decode().replace("%s", f"key {KEY} here")
    answer = client.post("/openai/v1/chat/completions", content=text)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("content_filter", "content_filter", param)
    assert "secrets" in error["message"]
    assert KEY not in answer.text
    assert answer.headers["x-guardrail-verdict"] == "block"
    assert answer.headers["x-guardrail-families"] == "secrets"
    assert len(predictor.seen) == count


@pytest.mark.parametrize("body", [item[0] for item in PROMPTS.values()], ids=PROMPTS.keys())
def test_personal_data_anywhere_in_a_prompt_is_replaced(
    client: httpx.Client, predictor: FakePredictor, body: dict
) -> None:
    text = orjson.dumps({"model": "m", **body}).decode().replace("%s", f"mail {MAIL} now")
    answer = client.post("/v1/chat/completions", content=text, headers=orders(say="ok"))
    assert answer.status_code == 200
    assert predictor.last["body"].decode().replace("<EMAIL_ADDRESS_1>", MAIL) == text.replace(": ", ":")
    assert answer.headers["x-guardrail-verdict"] == "redact"


def test_escaped_tool_arguments_are_read_as_what_they_say(client: httpx.Client, predictor: FakePredictor) -> None:
    arguments = '{"a":"x\\n' + KEY + '","b":1}'
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    body = {"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]}
    assert client.post("/v1/chat/completions", json=body).json()["error"]["type"] == "content_filter"
    call["function"]["arguments"] = '{"a": "jane.doe\\u0040example.com", "b": "cut'
    client.post("/v1/chat/completions", json=body, headers=orders(say="ok"))
    assert "example.com" not in predictor.last["body"].decode()


@pytest.mark.parametrize(
    ("path", "body", "shown"),
    [
        ("/v1/completions", {"prompt": f"mail {MAIL}"}, {"prompt": "mail <EMAIL_ADDRESS_1>"}),
        ("/v1/completions", {"prompt": ["a", MAIL, MAIL]}, {"prompt": ["a", "<EMAIL_ADDRESS_1>", "<EMAIL_ADDRESS_1>"]}),
        ("/v1/embeddings", {"input": ["a", f"pay {CARD}"]}, {"input": ["a", "pay <CREDIT_CARD_1>"]}),
        (
            "/v1/responses",
            {"input": MAIL, "instructions": CARD},
            {"input": "<EMAIL_ADDRESS_1>", "instructions": "<CREDIT_CARD_1>"},
        ),
        (
            "/v1/responses",
            {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": MAIL}]}]},
            {
                "input": [
                    {
                        "type": "message",
                        "role": "user",
                        "content": [{"type": "input_text", "text": "<EMAIL_ADDRESS_1>"}],
                    }
                ]
            },
        ),
        ("/tokenize", {"prompt": MAIL}, {"prompt": "<EMAIL_ADDRESS_1>"}),
        ("/v1/never_heard_of_it", {"anything": {"id": MAIL}}, {"anything": {"id": "<EMAIL_ADDRESS_1>"}}),
    ],
)
def test_prompts_of_other_endpoints(
    client: httpx.Client, predictor: FakePredictor, path: str, body: dict, shown: dict
) -> None:
    client.post(path, json={"model": "m", **body})
    assert sent_body(predictor) == {"model": "m", **shown}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [1, 2, 3]}, "prompt"),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, "prompt"),
        ("/v1/completions", {"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ("/v1/embeddings", {"input": [[1, 2]]}, "input"),
        ("/inference/v1/generate", {"token_ids": [1, 2]}, "token_ids"),
    ],
)
def test_what_cannot_be_checked_is_refused(client: httpx.Client, path: str, body: dict, param: str) -> None:
    answer = client.post(path, json={"model": "m", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert "give text" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "hint"),
    [
        (b"{nope", {}, 400, "not valid JSON"),
        (b'["a"]', {}, 400, "must be a JSON object"),
        (b'{"messages": "\xff"}', {}, 400, "not valid JSON"),
        (b"[" * 5000, {}, 400, "not valid JSON"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, {}, 400, "nested deeper"),
        (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", {}, 400, "nested deeper"),
        (b'{"a":' + b"[" * 1020 + b"]" * 1020 + b"}", {}, 400, "nested deeper"),
        (b'{"arguments":"' + b"[" * 1020 + b"]" * 1020 + b'"}', {}, 400, "nested deeper"),
        (b"x", {"content-encoding": "gzip"}, 415, "content-encoding"),
        (b"--x", {"content-type": "multipart/form-data; boundary=x"}, 415, "content-type"),
    ],
)
def test_bodies_that_are_no_json_are_refused(
    client: httpx.Client, content: bytes, headers: dict, status: int, hint: str
) -> None:
    answer = client.post("/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == status
    assert hint in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_pictures_pass(client: httpx.Client, predictor: FakePredictor) -> None:
    """Base64 of a picture looks like a secret to any rule; it is no text."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + KEY + "A" * 100}}
    body = {"model": "m", "messages": [{"role": "user", "content": [picture]}]}
    assert client.post("/v1/chat/completions", json=body, headers=orders(say="ok")).status_code == 200
    assert sent_body(predictor) == body


@pytest.mark.parametrize(
    "text", [f"data:image/png;base64,QUJD my key: {KEY}", f"data:image/{KEY}", f"data:audio/x, {KEY}"]
)
def test_only_a_picture_passes_as_one(client: httpx.Client, text: str) -> None:
    answer = client.post("/v1/chat/completions", json=ask(text))
    assert answer.json()["error"]["type"] == "content_filter"
    audio = {"type": "input_audio", "input_audio": {"data": f"my key: {KEY}", "format": "wav"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [audio]}]}
    assert client.post("/v1/chat/completions", json=body).json()["error"]["type"] == "content_filter"


def test_keys_that_say_something_are_checked(client: httpx.Client) -> None:
    answer = client.post("/v1/models/m:predict", json={"instances": [{KEY: 1}]})
    assert answer.status_code == 400
    assert KEY not in answer.text
    told = {
        "status": 200,
        "headers": {"content-type": "application/json"},
        "body": f'{{"predictions":[{{"{MAIL}":1}}]}}',
    }
    answer = client.post("/v1/models/m:predict", json={"instances": ["x"]}, headers=orders(**told))
    assert answer.json() == {"predictions": [{"<EMAIL_ADDRESS_1>": 1}]}


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers_are_redacted_in_place(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/chat/completions",
        json=ask("hi", n=2, logprobs=True),
        headers=orders(says=[f"key {KEY} and {MAIL}", "nothing here"], message={"reasoning": f"his card {CARD}"}),
    )
    assert answer.headers["x-guardrail-verdict"] == "redact"
    assert answer.headers["x-guardrail-families"] == "pii,secrets"
    first, second = answer.json()["choices"]
    assert first["message"]["content"] == "key <SECRET_1> and <EMAIL_ADDRESS_1>"
    assert first["message"]["reasoning"] == "his card <CREDIT_CARD_1>"
    assert first["logprobs"] is None
    assert second["message"]["content"] == "nothing here"
    assert answer.json()["usage"]["total_tokens"] == 12
    for value in (KEY, CARD, MAIL, KEY[:8]):
        assert value not in answer.text


def test_log_probabilities_stay_where_nothing_was_changed(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=ask("all is well", logprobs=True))
    assert [item["token"] for item in answer.json()["choices"][0]["logprobs"]["content"]] == ["all", "is", "well"]


def test_tool_calls_in_answers_are_redacted_and_still_json(client: httpx.Client) -> None:
    arguments = orjson.dumps({"to": MAIL, "type": KEY, "n": 3}).decode().replace("@", "\\u0040")
    message = {
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}],
    }
    answer = client.post("/v1/chat/completions", json=ask("hi"), headers=orders(message=message))
    function = answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]
    assert orjson.loads(function["arguments"]) == {"to": "<EMAIL_ADDRESS_1>", "type": "<SECRET_1>", "n": 3}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (
            '{"card": 4111111111111111, "n": [7, 5555555555554444]}',
            '{"card":"<CREDIT_CARD_1>","n":[7,"<CREDIT_CARD_2>"]}',
        ),
        (f'{{"{MAIL}": 1}}', '{"<EMAIL_ADDRESS_1>":1}'),
        (f'{{"a":"{KEY}","a":"x"}}', '{"a":"x"}'),
        (f'{{"b":{{"a":"{KEY}","a":"x"}},"u":"a:b"}}', '{"b":{"a":"x"},"u":"a:b"}'),
        ('{"u": "http://a.b:1/", "n": 123456789012345678901}', '{"u": "http://a.b:1/", "n": 123456789012345678901}'),
    ],
)
def test_tool_calls_hide_nothing_in_numbers_and_keys(client: httpx.Client, arguments: str, shown: str) -> None:
    calls = [{"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    whole = client.post("/v1/chat/completions", json=ask("hi"), headers=orders(message={"tool_calls": calls}))
    assert whole.json()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == shown
    streamed = client.post(
        "/v1/chat/completions", json=ask("hi", stream=True), headers=orders(tokens=[{"tool_calls": calls}])
    )
    deltas = [choice["delta"] for event in events(streamed)[:-1] for choice in event["choices"]]
    pieces = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls") or ()]
    assert "".join(pieces) == shown


@pytest.mark.parametrize(
    ("escaped", "plain"),
    [
        (r"a\n\tb\"c\\d\/e", 'a\n\tb"c\\d/e'),
        (r"\u0041\u004b\u00e9", "AK\u00e9"),
        (r"\ud83d", "\ufffd"),
        (r"\u00", "u00"),
        (r"\u00g1x", "u00g1x"),
        ("\\\n", "\n"),
        ("x\\", "x"),
        ("", ""),
    ],
)
def test_escapes_of_broken_json(escaped: str, plain: str) -> None:
    assert unescaped(escaped) == plain


def test_escapes_are_resolved_in_linear_time() -> None:
    assert len(unescaped("\\n" * 4_000_000)) == 4_000_000  # an hour, were it quadratic


def test_arguments_hide_no_repeated_key(client: httpx.Client, predictor: FakePredictor) -> None:
    """The arguments' own keys and colons are no part of the body's count."""
    call = '{"function":{"name":"f","arguments":"%s"}}'
    for arguments in ("{}", '{\\"a\\"\\u003a1}'):
        message = f'{{"role":"user","content":"{KEY}","content":"hi","tool_calls":[{call % arguments}]}}'
        body = f'{{"model":"m","messages":[{message}]}}'
        client.post("/v1/chat/completions", content=body, headers=orders(say="ok"))
        assert KEY not in predictor.last["body"].decode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/never_heard_of_it", {}),
        ("/v1/models/m:predict", {"instances": ["x"]}),
    ],
)
def test_answers_of_other_endpoints(client: httpx.Client, path: str, body: dict) -> None:
    told = {"say": f"use {KEY} now"}
    if "never" in path:
        told = {
            "status": 200,
            "body": f'{{"deep":[{{"id":"{KEY}"}}]}}',
            "headers": {"content-type": "application/json"},
        }
    answer = client.post(path, json={"model": "m", **body} if "instances" not in body else body, headers=orders(**told))
    assert answer.status_code == 200
    assert KEY not in answer.text
    assert "<SECRET_1>" in answer.text


def test_a_text_answer_is_checked(client: httpx.Client) -> None:
    given = orders(status=200, body=f"mail {MAIL}", headers={"content-type": "text/plain"})
    assert client.post("/v1/audio/x", json={}, headers=given).text == "mail <EMAIL_ADDRESS_1>"


@pytest.mark.parametrize(
    "told",
    [
        {"status": 200, "body": "{broken", "headers": {"content-type": "application/json"}},
        {"status": 200, "body": "[" * 300 + "]" * 300, "headers": {"content-type": "application/json"}},
        {"status": 200, "body": "[" * 1020 + "]" * 1020, "headers": {"content-type": "application/json"}},
        {"raw": 'data: {"choices":[],"x":' + "[" * 1000 + "]" * 1000 + "}\n\n"},
        {"status": 200, "body": "x", "headers": {"content-type": "application/json", "content-encoding": "br"}},
        {"raw": "data: nonsense\n\ndata: [DONE]\n\n"},
        {"raw": 'data: {"text_output":"a"}\n\n'},
        {"raw": 'data: {"choices":["x"]}\n\n'},
    ],
)
def test_answers_that_cannot_be_checked_never_pass(client: httpx.Client, told: dict) -> None:
    answer = client.post("/v1/chat/completions", json=ask("hi"), headers=orders(**told))
    error = events(answer)[0]["error"] if "raw" in told else answer.json()["error"]
    assert error["type"] == "upstream_error"
    assert answer.status_code == (200 if "raw" in told else 502)
    if "raw" in told:
        assert answer.text.endswith("data: [DONE]\n\n")


# --- clients people have --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_openai_client(transformer: Served, prefix: str) -> None:
    with openai.OpenAI(base_url=transformer.url + prefix, api_key="k", max_retries=0) as client:
        messages = [{"role": "user", "content": f"my mail is {MAIL} ok"}]
        answer = client.chat.completions.create(model="m", messages=messages)
        assert answer.choices[0].message.content == "my mail is <EMAIL_ADDRESS_1> ok"
        stream = client.chat.completions.create(
            model="m", messages=messages, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == answer.choices[0].message.content
        assert chunks[-1].usage is not None
        assert client.completions.create(model="m", prompt="hello").choices[0].text == "hello"
        assert client.embeddings.create(model="m", input="abc", encoding_format="float").data[0].embedding == [0.25, 3]
        assert client.responses.create(model="m", input=f"to {MAIL}").output_text == "to <EMAIL_ADDRESS_1>"
        assert [model.id for model in client.models.list()] == ["m"]
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": KEY}])
        assert refused.value.code == "content_filter"


def test_openai_client_streams_responses(transformer: Served) -> None:
    told = orders(say=f"use {KEY} for {CARD} ok")
    with (
        openai.OpenAI(base_url=transformer.url + "/v1", api_key="k", max_retries=0) as client,
        client.responses.stream(model="m", input="to the point", extra_headers=told) as stream,
    ):
        seen = list(stream)
        final = stream.get_final_response()
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert text == final.output_text == "use <SECRET_1> for <CREDIT_CARD_1> ok"
    numbers = [event.sequence_number for event in seen]
    assert numbers == sorted(set(numbers))


# --- what is told -----------------------------------------------------------------------------------------------


def test_metrics_and_access_log(transformer: Served, client: httpx.Client) -> None:
    def counts() -> list[float]:
        return [
            metric(transformer, "guardrail_requests_total", direction="prompt", decision="block"),
            metric(transformer, "guardrail_detections_total", family="secrets", label="SECRET", action="block"),
            metric(transformer, "guardrail_detections_total", family="pii", label="CREDIT_CARD", action="redact"),
            metric(transformer, "guardrail_requests_total", direction="answer", decision="redact"),
            metric(transformer, "guardrail_overhead_seconds_count", direction="prompt"),
        ]

    before = counts()
    client.post("/v1/chat/completions", json=ask(KEY), headers={"x-request-id": "blocked-1"})
    client.post("/v1/chat/completions", json=ask("hi"), headers={**orders(say=CARD), "x-request-id": "redacted-1"})
    streamed = client.post("/v1/chat/completions", json=ask("hi", stream=True), headers=orders(say=CARD))
    assert said(events(streamed)) == "<CREDIT_CARD_1>"
    assert [after - was for after, was in zip(counts(), before, strict=True)] == [1, 1, 2, 2, 3]
    assert metric(transformer, "guardrail_policy_info", name="values") == 1

    lines = {line["request_id"]: line for line in transformer.access_lines()}
    assert lines["blocked-1"]["verdict"] == "block"
    assert lines["blocked-1"]["families"] == ["secrets"]
    assert lines["redacted-1"]["verdict"] == "redact"
    assert lines["redacted-1"]["upstream_status"] == 200
    log = orjson.dumps(transformer.access_lines()).decode() + transformer.stderr()
    assert KEY not in log
    assert CARD not in log
