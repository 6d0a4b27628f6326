"""Anthropic's Messages API through the transformer, by its own client: bodies and events, both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from anthropic import Anthropic, APIStatusError, BadRequestError
from prometheus_client import CollectorRegistry

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import shipped_policy
from aim_guardrail.protocols.messages import MESSAGES
from aim_guardrail.slots.collect import collect
from aim_guardrail.streams.events import StreamScreen
from aim_kserve.sse import EventReader
from fake_predictor import FakePredictor
from guarded import orders
from served import Served

KEY = "AKIA" + "3XPZ7QKLMN2VWTYB"
CARD = "4111 1111 1111 1111"
MAIL = "jane.doe@example.com"
TEXT = f"Use {KEY} and pay with {CARD}, then go."
SHOWN = "Use <SECRET_1> and pay with <CREDIT_CARD_1>, then go."
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
ASKED: dict[str, Any] = {"model": "m", "max_tokens": 9}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard.load(shipped_policy("values"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, predictor: FakePredictor) -> Iterator[Served]:
    policy = tmp_path_factory.mktemp("messages") / "policy.yaml"
    rules = "[{type: pii, action: redact}, {type: words, action: {BAD: block, MILD: redact}}]"
    policy.write_text(f"version: 2\nname: t\nbudget_ms: 5000\nprompt: {rules}\nanswer: {rules}\n")
    flags = ["--model_name", "m", "--predictor_host", predictor.host, "--policy", str(policy)]
    with Served(["-m", "word_family", *flags]) as server:
        yield server


def client_of(server: Served, **told: Any) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="k", max_retries=0, default_headers=orders(**told) if told else {})


@pytest.fixture
def anthropic(transformer: Served) -> Anthropic:
    return client_of(transformer)


# --- what is asked --------------------------------------------------------------------------------------------------

PLACES: dict[str, Any] = {
    "system": lambda text: {"system": text},
    "system blocks": lambda text: {"system": [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]},
    "content": lambda text: {"messages": [{"role": "user", "content": text}]},
    "blocks": lambda text: {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
    "tool use": lambda text: _block({"type": "tool_use", "id": "t", "name": "f", "input": {"q": [text]}}, "assistant"),
    "tool result": lambda text: _block({"type": "tool_result", "tool_use_id": "t", "content": text}),
    "tool result blocks": lambda text: _block(
        {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": text}]}
    ),
    "thinking": lambda text: _block({"type": "thinking", "thinking": text, "signature": "c2ln"}, "assistant"),
    "document": lambda text: _block(
        {"type": "document", "title": "t", "source": {"type": "text", "media_type": "text/plain", "data": text}}
    ),
    "document blocks": lambda text: _block(
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": text}]}}
    ),
    "search result": lambda text: _block(
        {"type": "search_result", "source": "https://x.org", "title": "t", "content": [{"type": "text", "text": text}]}
    ),
    "tool": lambda text: {"tools": [{"name": "f", "description": text, "input_schema": {"type": "object"}}]},
    "schema": lambda text: {"tools": [{"name": "f", "input_schema": {"properties": {"a": {"description": text}}}}]},
    "stop": lambda text: {"stop_sequences": [text]},
    "metadata": lambda text: {"metadata": {"user_id": text}},
    "new": lambda text: {"thoughts_of_2031": [text]},
}


def _block(block: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": role, "content": [block]}]}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("place", PLACES)
def test_every_text_of_a_request_is_checked(
    client: httpx.Client, predictor: FakePredictor, place: str, path: str
) -> None:
    answer = client.post(path, json={**ASKED, "messages": HI, **PLACES[place](KEY)}, headers=orders(say="ok"))
    assert answer.status_code == 400, place
    error = answer.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["code"] == "content_filter"
    assert KEY not in answer.text
    client.post(path, json={**ASKED, "messages": HI, **PLACES[place](f"to {MAIL}")}, headers=orders(say="ok"))
    assert MAIL not in predictor.last["body"].decode()
    assert "<EMAIL_ADDRESS_1>" in predictor.last["body"].decode()


def test_what_is_no_text_goes_on_as_it_came(client: httpx.Client, predictor: FakePredictor) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjc="}}
    body = orjson.dumps({**ASKED, **_block(image), "system": [pdf], "tool_choice": {"type": "auto"}})
    assert client.post("/v1/messages", content=body, headers={"content-type": "application/json"}).status_code == 200
    assert predictor.last["body"] == body


def test_who_says_it_is_known() -> None:
    """What a tool or a document says was not written by whoever asks."""
    said = {place: collect("prompt", make("x y"), MESSAGES).items[-1].role for place, make in PLACES.items()}
    assert {place: said[place] for place in ("content", "tool result", "tool result blocks", "search result")} == {
        "content": "user",
        "tool result": "tool",
        "tool result blocks": "tool",
        "search result": "document",
    }
    assert said["document"] == said["document blocks"] == "document"


# --- what is answered -----------------------------------------------------------------------------------------------


def test_an_answer_is_redacted(transformer: Served) -> None:
    tool = {"type": "tool_use", "id": "t", "name": "f", "input": {"to": MAIL, "card": 4111111111111111}}
    content = [{"type": "thinking", "thinking": TEXT, "signature": "c2ln"}, {"type": "text", "text": TEXT}, tool]
    got = client_of(transformer, content=content).messages.create(**ASKED, messages=HI)
    thinking, text, use = got.content
    assert (thinking.thinking, text.text) == (SHOWN, SHOWN)  # type: ignore[union-attr]
    assert use.input == {"to": "<EMAIL_ADDRESS_1>", "card": "<CREDIT_CARD_1>"}  # type: ignore[union-attr]
    assert got.stop_reason == "end_turn"


def test_a_blocked_answer_is_a_refusal(words: Served) -> None:
    client = client_of(words, say="so badword it is")
    got = client.messages.with_raw_response.create(**ASKED, messages=HI)
    assert got.headers["x-guardrail-verdict"] == "block"
    message = got.parse()
    assert (message.content, message.stop_reason, message.id) == ([], "refusal", "msg_1")


def test_a_blocked_prompt_is_an_error_of_theirs(words: Served) -> None:
    with pytest.raises(BadRequestError) as refused:
        client_of(words).messages.create(**ASKED, messages=[{"role": "user", "content": "badword"}])
    assert refused.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert "words" in str(refused.value)


def test_a_predictor_that_fails_is_an_error_of_theirs(transformer: Served) -> None:
    with pytest.raises(APIStatusError) as refused:
        client_of(
            transformer, status=200, body="no json", headers={"content-type": "application/json"}
        ).messages.create(**ASKED, messages=HI)
    assert refused.value.body["error"]["type"] == "api_error"  # type: ignore[index]


# --- streamed -------------------------------------------------------------------------------------------------------


def stream(client: Anthropic) -> Any:
    with client.messages.stream(**ASKED, messages=HI) as got:
        return got.get_final_message()


def split(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 7, 200])
def test_a_streamed_answer_is_the_whole_one(transformer: Served, size: int) -> None:
    arguments = orjson.dumps({"to": MAIL, "card": 4111111111111111}).decode()
    deltas = [
        [
            {"type": "thinking", "thinking": "", "signature": ""},
            [
                *({"type": "thinking_delta", "thinking": p} for p in split(TEXT, size)),
                {"type": "signature_delta", "signature": "c2ln"},
            ],
        ],
        [{"type": "text", "text": ""}, [{"type": "text_delta", "text": piece} for piece in split(TEXT, size)]],
        [
            {"type": "tool_use", "id": "t", "name": "f", "input": {}},
            [{"type": "input_json_delta", "partial_json": piece} for piece in split(arguments, size)],
        ],
    ]
    got = stream(client_of(transformer, deltas=deltas))
    thinking, text, use = got.content
    assert (thinking.thinking, thinking.signature, text.text) == (SHOWN, "c2ln", SHOWN)
    assert use.input == {"to": "<EMAIL_ADDRESS_1>", "card": "<CREDIT_CARD_1>"}
    assert (got.stop_reason, got.usage.output_tokens) == ("end_turn", 7)


def test_text_that_a_block_begins_with_is_checked_with_its_deltas(transformer: Served) -> None:
    deltas = [[{"type": "text", "text": f"to {MAIL[:6]}"}, [{"type": "text_delta", "text": MAIL[6:] + " now"}]]]
    assert stream(client_of(transformer, deltas=deltas)).content[0].text == "to <EMAIL_ADDRESS_1> now"


def test_citations_and_results_of_tools_are_checked(transformer: Served) -> None:
    cited = {"type": "web_search_result_location", "url": "https://x.org", "title": MAIL, "cited_text": KEY}
    result = {"type": "web_search_result", "title": MAIL, "url": "https://x.org", "encrypted_content": "x"}
    found = {"type": "web_search_tool_result", "tool_use_id": "t", "content": [result]}
    deltas = [[{"type": "text", "text": ""}, [{"type": "citations_delta", "citation": cited}]], [found, []]]
    told = orders(deltas=deltas)
    body = {**ASKED, "messages": HI, "stream": True}
    answer = httpx.post(f"{transformer.url}/v1/messages", json=body, headers=told)
    assert MAIL not in answer.text
    assert KEY not in answer.text
    assert answer.text.count("<EMAIL_ADDRESS_1>") == 2


def events(raw: str) -> list[Any]:
    return [orjson.loads(line.removeprefix("data: ")) for line in raw.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("text", ["Well then. badword and on", "badword"])
def test_a_blocked_stream_ends_as_a_refusal(words: Served, text: str) -> None:
    got = stream(client_of(words, say=f"{text} and on " * 3))
    assert got.stop_reason == "refusal"
    assert "badword" not in got.model_dump_json()
    raw = httpx.post(
        f"{words.url}/v1/messages", json={**ASKED, "messages": HI, "stream": True}, headers=orders(say=text)
    ).text
    kinds = [event["type"] for event in events(raw)]
    assert kinds[0] == "message_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")


def test_a_streams_failure_is_an_event_of_theirs(transformer: Served) -> None:
    body = {**ASKED, "messages": HI, "stream": True}
    for told in (orders(say="one two three", drop_after=300), orders(raw="data: no json\n\n")):
        answer = httpx.post(f"{transformer.url}/v1/messages", json=body, headers=told)
        assert events(answer.text)[-1]["error"]["type"] == "api_error"
        assert answer.text.rsplit("event: ", 1)[1].startswith("error\n")


def test_an_error_event_passes_checked_and_ends_the_stream(client: httpx.Client) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": f"ask {MAIL}"}}
    raw = f"event: error\ndata: {orjson.dumps(error).decode()}\n\n"
    got = client.post("/v1/messages", json={**ASKED, "messages": HI, "stream": True}, headers=orders(raw=raw)).text
    assert [event["error"]["message"] for event in events(got)] == ["ask <EMAIL_ADDRESS_1>"]


def test_nothing_leaks_at_any_split(guard: Guard) -> None:
    for kind, field in (("text_delta", "text"), ("thinking_delta", "thinking"), ("input_json_delta", "partial_json")):
        whole, shown = (f'{{"a":"{TEXT}"}}', f'{{"a":"{SHOWN}"}}') if field == "partial_json" else (TEXT, SHOWN)
        for cut in range(1, len(whole)):
            out = screened(guard, kind, field, [whole[:cut], whole[cut:]])
            assert "".join(e["delta"][field] for e in events(out) if e["type"] == "content_block_delta") == shown
            assert KEY[:8] not in out
            assert "1111" not in out


def screened(guard: Guard, kind: str, field: str, pieces: list[str]) -> str:
    metrics = Metrics(CollectorRegistry())
    stream = StreamScreen(Screening(guard, metrics, RequestContext("/v1/messages")), metrics)
    said = [{"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}]
    said += [{"type": "content_block_delta", "index": 0, "delta": {"type": kind, field: piece}} for piece in pieces]
    said += [{"type": "content_block_stop", "index": 0}, {"type": "message_stop"}]
    raw = b"".join(b"event: x\ndata: " + orjson.dumps(item) + b"\n\n" for item in said)
    out = b"".join(stream.feed(event) for event in EventReader().feed(raw)).decode()
    stream.close()
    assert stream.ended
    return out
