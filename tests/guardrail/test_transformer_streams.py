"""Streamed answers through the transformer: nothing leaks at any split, unary and streamed answers are equal."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from threading import get_ident
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

import guardrail_values
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import parse_policy, shipped_policy
from aim_guardrail.streams.events import StreamScreen
from aim_guardrail.streams.inline import shown_inline
from aim_kserve.errors import UpstreamFailed
from aim_kserve.sse import Event, EventReader
from fake_predictor import FakePredictor
from guarded import ask, events, eventually, guardrail, metric, orders, said

CONTEXT = RequestContext("/v1/chat/completions")
KEY = "AKIA" + "3XPZ7QKLMN2VWTYB"
CARD = "4111 1111 1111 1111"
TEXT = f"Use {KEY} and pay with {CARD}, then go."
SHOWN = "Use <SECRET_1> and pay with <CREDIT_CARD_1>, then go."


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard.load(shipped_policy("values"))


def screened(guard: Guard, chunks: list[bytes]) -> str:
    """What the client gets of a stream that comes in these chunks."""
    metrics = Metrics(CollectorRegistry())
    stream, reader = StreamScreen(Screening(guard, metrics, CONTEXT), metrics), EventReader()
    out = [stream.feed(event) for chunk in chunks for event in reader.feed(chunk)]
    out += [stream.feed(event) for event in reader.rest()]
    stream.close()
    assert stream.ended
    return b"".join(out).decode()


def frames(deltas: list[Any], *, finish: str = "stop") -> bytes:
    """A chat stream as vLLM sends it."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}
    all_deltas = [{"role": "assistant", "content": ""}, *({"content": d} if isinstance(d, str) else d for d in deltas)]
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} for delta in all_deltas]
    choices.append({"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish, "stop_reason": None})
    lines = [b"data: " + orjson.dumps({**head, "choices": [choice]}) for choice in choices]
    usage = {**head, "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}
    return b"\n\n".join([*lines, b"data: " + orjson.dumps(usage), b"data: [DONE]", b""])


def parsed(text: str) -> list[Any]:
    return events(httpx.Response(200, text=text))


# --- what it costs ---------------------------------------------------------------------------------------------------


class Threads(StreamScreen):
    """Notes in which thread each event is checked."""

    def feed(self, event: Event) -> bytes:
        self.seen = [*getattr(self, "seen", []), get_ident()]
        return super().feed(event)


@pytest.mark.parametrize(
    ("deltas", "at_once"),
    [
        (["a ", "b " * 500, "c "], [True] * 6),
        (["a ", "b " * 1500, "c "], [True, True, False, True, True, True]),
        ([{"tool_calls": [{"index": 0, "function": {"arguments": "1" * 1500}}]}] * 2, [True, True, False, False, True]),
        (
            ["-----BEGIN PRIVATE KEY-----\n", "A" * 1500, "B" * 1500, " c"],
            [True, True, True, False, False, False, True],
        ),
    ],
    ids=["small", "a large delta", "large arguments", "a long hold"],
)
async def test_what_takes_long_is_checked_in_a_thread(guard: Guard, deltas: list[Any], at_once: list[bool]) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield frames(deltas)

    metrics = Metrics(CollectorRegistry())
    stream = Threads(Screening(guard, metrics, CONTEXT), metrics)
    async for _ in shown_inline(stream, chunks(), EventReader()):
        pass
    assert stream.ended
    assert [ident == get_ident() for ident in stream.seen][: len(at_once)] == at_once


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_large_streamed_answers_are_the_whole_ones(client: httpx.Client, path: str) -> None:
    prompt = f"{TEXT} Call +1 415-555-2671. " * 40
    tokens = [prompt[:3000], prompt[3000:]]
    body = {**ask("hi", stream=True), "input": "hi"}
    answer = client.post(path, json=body, headers=orders(say=prompt, tokens=tokens))
    shown = f"{SHOWN} Call <PHONE_NUMBER_1>. " * 40
    whole = events(answer)
    if path.endswith("responses"):
        assert "".join(event.get("delta", "") for event in whole if event != "[DONE]") == shown
        assert whole[-1]["response"]["output"][0]["content"][0]["text"] == shown
    else:
        assert said(whole) == shown


# --- any cut ------------------------------------------------------------------------------------------------------


def test_no_value_leaks_at_any_split_of_the_text(guard: Guard) -> None:
    """A planted key and a card, the answer cut in two at every position."""
    for cut in range(1, len(TEXT)):
        shown = screened(guard, [frames([TEXT[:cut], TEXT[cut:]])])
        assert said(parsed(shown)) == SHOWN, cut


def test_no_value_leaks_character_by_character(guard: Guard) -> None:
    shown = screened(guard, [frames(list(TEXT))])
    assert said(parsed(shown)) == SHOWN


def test_any_cut_of_the_bytes_gives_the_same_answer(guard: Guard) -> None:
    """Every position of the byte stream, UTF-8 and line ends included."""
    stream = frames(["Käse 🧀 ", TEXT[:9], TEXT[9:30], TEXT[30:]])
    whole = screened(guard, [stream])
    assert said(parsed(whole)) == "Käse 🧀 " + SHOWN
    for cut in range(len(stream)):
        assert screened(guard, [stream[:cut], stream[cut:]]) == whole


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), ends=st.sampled_from([b"\n", b"\r\n", b"\r"]), noise=st.booleans())
def test_streamed_and_whole_answers_are_equal(guard: Guard, seed: int, ends: bytes, noise: bool) -> None:
    """Any values, any pieces, any line ends, any cut of the bytes: the text and the verdict of checking it whole."""
    random = Random(seed)
    values = [random.choice(list(guardrail_values.PII.values()))(random) for _ in range(2)]
    before, secret, after = random.choice(list(guardrail_values.SECRETS.values()))(random)
    text = guardrail_values.document(random, [*values, before + secret + after])
    whole = Screening(guard, Metrics(CollectorRegistry()), CONTEXT)
    checked = whole.text("answer", text)

    stream = frames(guardrail_values.splits(random, text))
    if noise:
        stream = stream.replace(b"data: ", b": keep-alive\n\nid: 7\ndata:")
    stream = b"\xef\xbb\xbf" + stream.replace(b"\n", ends)
    cuts = sorted(random.choices(range(len(stream)), k=random.choice([0, 3, 40])))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    metrics = Metrics(CollectorRegistry())
    screening = Screening(guard, metrics, CONTEXT)
    screen, reader = StreamScreen(screening, metrics), EventReader()
    out = b"".join(screen.feed(event) for chunk in chunks for event in [*reader.feed(chunk)])
    out += b"".join(screen.feed(event) for event in reader.rest())
    screen.close()
    got = parsed(out.decode().replace("data:{", "data: {").replace("data:[", "data: ["))
    assert said(got) == checked
    assert screening.actions == whole.actions
    assert screening.families == whole.families
    assert got[-1] == "[DONE]"


# --- what else is in a stream -------------------------------------------------------------------------------------


def test_what_is_not_held_passes_as_it_came(guard: Guard) -> None:
    stream = frames(["well. \n", "\n"])
    assert screened(guard, [stream]) == stream.decode()


def test_usage_and_finish_come_after_the_held_text(guard: Guard) -> None:
    got = parsed(screened(guard, [frames(["Hello", " wor", "ld"])]))
    assert said(got) == "Hello world"
    assert got[-3]["choices"][0]["finish_reason"] == "stop"
    assert got[-3]["choices"][0]["delta"] == {}
    assert got[-2]["usage"]["total_tokens"] == 3
    assert [c["finish_reason"] for e in got[:-2] for c in e["choices"]].count("stop") == 1


@pytest.mark.parametrize("field", ["content", "reasoning", "reasoning_content", "refusal", "thoughts_of_2031"])
def test_every_streamed_field_is_checked(guard: Guard, field: str) -> None:
    shown = screened(guard, [frames([{field: piece} for piece in (TEXT[:8], TEXT[8:35], TEXT[35:])])])
    assert said(parsed(shown), field=field) == SHOWN


def test_fields_do_not_mix(guard: Guard) -> None:
    pieces = [
        {"content": "to jane", "reasoning": "card 4111 1111"},
        {"content": ".doe@example.com", "reasoning": " 1111 1111"},
    ]
    got = parsed(screened(guard, [frames(pieces)]))
    assert said(got) == "to <EMAIL_ADDRESS_1>"
    assert said(got, field="reasoning") == "card <CREDIT_CARD_1>"


def test_choices_are_checked_apart(guard: Guard) -> None:
    """n=2, interleaved: neither joins the other's pieces."""
    head = {"id": "c", "object": "chat.completion.chunk", "model": "m"}
    pairs = [(0, "mail jane."), (1, "card 4111 1111 "), (0, "doe@example.com now"), (1, "1111 1111 now")]
    data = [{**head, "choices": [{"index": i, "delta": {"content": t}}]} for i, t in pairs]
    data += [{**head, "choices": [{"index": i, "delta": {}, "finish_reason": "stop"} for i in (0, 1)]}]
    stream = b"".join(b"data: " + orjson.dumps(item) + b"\n\n" for item in data) + b"data: [DONE]\n\n"
    got = parsed(screened(guard, [stream]))
    assert said(got, 0) == "mail <EMAIL_ADDRESS_1> now"
    assert said(got, 1) == "card <CREDIT_CARD_1> now"


def test_tool_call_arguments_are_checked_as_json(guard: Guard) -> None:
    arguments = orjson.dumps({"mail": "jane.doe@example.com", "note": f"x\n{KEY}"}).decode().replace("@", "\\u0040")
    deltas: list[Any] = [
        {
            "tool_calls": [
                {"index": 0, "id": "call_1", "type": "function", "function": {"name": "send", "arguments": ""}}
            ]
        }
    ]
    deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in arguments]
    deltas += [{"tool_calls": [{"index": 1, "id": "call_2", "function": {"name": "stop", "arguments": '{"a":1}'}}]}]
    got = parsed(screened(guard, [frames(deltas, finish="tool_calls")]))
    calls: dict[int, dict[str, str]] = {}
    for event in got[:-1]:
        for choice in event["choices"]:
            for call in choice["delta"].get("tool_calls") or ():
                mine = calls.setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
                mine["id"] += call.get("id") or ""
                for key, value in call["function"].items():
                    mine[key] += value
    assert orjson.loads(calls[0].pop("arguments")) == {"mail": "<EMAIL_ADDRESS_1>", "note": "x\n<SECRET_1>"}
    assert calls == {0: {"id": "call_1", "name": "send"}, 1: {"id": "call_2", "name": "stop", "arguments": '{"a":1}'}}


@pytest.mark.parametrize("odd", [{"delta": {}, "text": KEY}, {"delta": KEY}, {"delta": [KEY]}])
def test_a_choice_of_unknown_form_ends_the_stream(guard: Guard, odd: dict[str, Any]) -> None:
    frame = b"data: " + orjson.dumps({"choices": [{"index": 0, **odd}]}) + b"\n\n"
    with pytest.raises(UpstreamFailed):
        screened(guard, [frame])


def test_log_probabilities_do_not_tell_what_is_held(guard: Guard) -> None:
    head = {"id": "c", "object": "chat.completion.chunk", "model": "m"}
    choices = [
        {"index": 0, "delta": {"content": t}, "logprobs": {"content": [{"token": t}]}, "token_ids": [1]}
        for t in ("4111 ", "1111 ", "1111 ", "1111", ".")
    ]
    stream = b"".join(b"data: " + orjson.dumps({**head, "choices": [c]}) + b"\n\n" for c in choices)
    shown = screened(guard, [stream + b"data: [DONE]\n\n"])
    assert "1111" not in shown
    assert said(parsed(shown)) == "<CREDIT_CARD_1>."


def test_a_block_ends_the_stream(guard: Guard) -> None:
    blocking = parse_policy("version: 1\nname: b\nanswer: [{type: secrets, action: block}]\n", "b.yaml")
    strict = Guard.load(blocking, reuse=guard)
    metrics = Metrics(CollectorRegistry())
    stream = StreamScreen(Screening(strict, metrics, CONTEXT), metrics)
    out, fed = b"", 0
    for event in EventReader().feed(frames(["Here is ", "the key ", KEY[:9], KEY[9:], " enjoy ", "more ", "text"])):
        if stream.ended:
            break
        out += stream.feed(event)
        fed += 1
    got = parsed(out.decode())
    assert said(got) == "Here is the key "
    assert got[-2]["choices"][0]["finish_reason"] == "content_filter"
    assert got[-1] == "[DONE]"
    assert KEY[:6] not in out.decode()
    assert fed < 9


@pytest.mark.parametrize("unreal", ["", "null", " Null ", "None", False, 0, {}])
def test_only_a_real_reason_ends_a_choice(guard: Guard, unreal: Any) -> None:
    """Some servers write ``""`` or ``"null"`` where OpenAI writes null: a value split over such chunks is one value."""
    call = [{"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"mail": "jane.d'}}]
    rest = [{"index": 0, "function": {"arguments": 'oe@example.com"}'}}]
    pieces = [*guardrail_values.splits(Random(3), TEXT), {"tool_calls": call}, {"tool_calls": rest}]
    stream = frames(pieces).replace(b'"finish_reason":null', b'"finish_reason":' + orjson.dumps(unreal))
    got = parsed(screened(guard, [stream]))
    assert said(got) == SHOWN
    calls = [c for e in got[:-1] for choice in e["choices"] for c in choice["delta"].get("tool_calls") or ()]
    assert "".join(c["function"]["arguments"] for c in calls) == '{"mail":"<EMAIL_ADDRESS_1>"}'


@pytest.mark.parametrize("more", [{"delta": {"content": KEY[9:]}}, {"text": KEY[9:]}])
def test_what_follows_a_real_reason_is_not_shown(guard: Guard, more: dict[str, Any]) -> None:
    """What went before is out already and was judged as complete: no value can be put together behind its end."""
    first = {"delta": {"content": KEY[:9]}} if "delta" in more else {"text": KEY[:9]}
    choices = [{"index": 0, **item, "finish_reason": "stop"} for item in (first, more)]
    stream = b"".join(b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n" for choice in choices)
    with pytest.raises(UpstreamFailed, match="after its finish_reason"):
        screened(guard, [stream])


def test_an_empty_chunk_may_follow_a_real_reason(guard: Guard) -> None:
    choice = b'{"index":0,"delta":{"content":"","role":"assistant"},"finish_reason":"stop"}'
    last = b'data: {"choices":[%s],"usage":{}}\n\n' % choice
    stream = frames(["well. ", "done"]).replace(b"data: [DONE]", last + b"data: [DONE]")
    assert said(parsed(screened(guard, [stream]))) == "well. done"


def test_the_chunk_with_the_finish_reason_may_say_the_last_words(guard: Guard) -> None:
    """As vLLM's does: what was held of them goes behind what was shown of them, not before."""
    for cut in range(len(TEXT)):
        pieces = [TEXT[:cut], TEXT[cut:]]
        for form in ({"delta": {"content": ""}}, {"text": ""}):
            stream = b""
            for piece, reason in zip(pieces, (None, "stop"), strict=True):
                content = {"delta": {"content": piece}} if "delta" in form else {"text": piece}
                chunk = {"choices": [{"index": 0, **content, "finish_reason": reason}]}
                stream += b"data: " + orjson.dumps(chunk) + b"\n\n"
            got = parsed(screened(guard, [stream + b"data: [DONE]\n\n"]))
            assert said(got) == SHOWN, (cut, form)
            assert [c["finish_reason"] for e in got[:-1] for c in e["choices"] if c["finish_reason"]] == ["stop"]


def test_the_chunk_with_the_finish_reason_may_be_a_whole_tool_call(guard: Guard) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    chunk = {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    got = parsed(screened(guard, [b"data: " + orjson.dumps(chunk) + b"\n\ndata: [DONE]\n\n"]))
    calls = [c for e in got[:-1] for choice in e["choices"] for c in choice["delta"].get("tool_calls") or ()]
    assert calls[0]["function"]["name"] == "f"
    assert "".join(c["function"]["arguments"] for c in calls) == '{"a":1}'
    assert got[-2]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("last", [{"delta": None}, {}])
def test_a_last_chunk_without_a_delta(guard: Guard, last: dict[str, Any]) -> None:
    chunks = [{"delta": {"content": "one two"}, "finish_reason": None}, {**last, "finish_reason": "stop"}]
    stream = b"".join(b"data: " + orjson.dumps({"choices": [{"index": 0, **c}]}) + b"\n\n" for c in chunks)
    got = parsed(screened(guard, [stream + b"data: [DONE]\n\n"]))
    deltas = [c["delta"] for e in got[:-1] for c in e["choices"] if c.get("delta")]
    assert "".join(delta["content"] for delta in deltas) == "one two"


# --- over HTTP -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
def test_streams_over_http_equal_unary(client: httpx.Client, path: str, size: int) -> None:
    body = ask("hi") if "chat" in path else {"model": "m", "prompt": "hi"}
    unary = client.post(path, json=body, headers=orders(say=TEXT)).json()["choices"][0]
    text = unary["message"]["content"] if "message" in unary else unary["text"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post(path, json={**body, **options}, headers=orders(say=TEXT, chunks=size))
    got = events(response)
    assert said(got) == text == SHOWN
    assert got[-2]["usage"]["prompt_tokens"] == 5
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"


def test_the_first_words_do_not_wait_for_the_last(client: httpx.Client, predictor: FakePredictor) -> None:
    told = orders(say="one two three four five six seven eight", token_s=0.3)
    with client.stream("POST", "/v1/chat/completions", json=ask("hi", stream=True), headers=told) as response:
        assert any('"content":"one' in line for line in response.iter_lines())
        assert predictor.open == 1  # still speaking
    assert eventually(lambda: predictor.open == 0)


def test_responses_stream_redacts(client: httpx.Client) -> None:
    response = client.post("/v1/responses", json={"model": "m", "input": "x", "stream": True}, headers=orders(say=TEXT))
    assert KEY not in response.text
    assert CARD not in response.text
    got = events(response)
    assert "".join(e["delta"] for e in got if e["type"] == "response.output_text.delta") == SHOWN
    assert got[-1]["response"]["output"][0]["content"][0]["text"] == SHOWN
    assert [e["sequence_number"] for e in got] == list(range(len(got)))


def test_a_blocked_responses_stream_is_incomplete(predictor: FakePredictor, guard: Guard) -> None:
    blocking = parse_policy("version: 1\nname: b\nanswer: [{type: secrets, action: block}]\n", "b.yaml")
    metrics = Metrics(CollectorRegistry())
    stream = StreamScreen(Screening(Guard.load(blocking, reuse=guard), metrics, CONTEXT), metrics)
    told = {"model": "m", "input": f"here: {KEY} ok", "stream": True}
    came = httpx.post(f"http://{predictor.host}/v1/responses", json=told).content
    out = b""
    for event in EventReader().feed(came):
        if not stream.ended:
            out += stream.feed(event)
    got = parsed(out.decode())
    assert got[-1]["type"] == "response.incomplete"
    assert got[-1]["response"]["incomplete_details"] == {"reason": "content_filter"}
    assert KEY not in "".join(str(e.get("delta")) for e in got)


def test_a_blocked_stream_closes_the_predictors(tmp_path: Path, predictor: FakePredictor) -> None:
    policy = tmp_path / "block.yaml"
    policy.write_text("version: 1\nname: block\nanswer: [{type: secrets, action: block}]\n")
    with guardrail(predictor.host, "--policy", str(policy)) as server:
        told = orders(tokens=["the key ", KEY + " ", *["more "] * 400], token_s=0.05)
        response = httpx.post(
            f"{server.url}/v1/chat/completions", json=ask("hi", stream=True), headers=told, timeout=15
        )
        got = events(response)
        assert said(got) == "the key "
        assert got[-2]["choices"][0]["finish_reason"] == "content_filter"
        assert got[-1] == "[DONE]"
        assert eventually(lambda: predictor.open == 0)
        assert metric(server, "guardrail_upstream_connections") == 0
        unary = httpx.post(f"{server.url}/v1/chat/completions", json=ask("hi"), headers=orders(say=KEY))
        assert unary.status_code == 400
        assert unary.json()["error"]["code"] == "content_filter"
        assert unary.json()["error"]["param"] == "choices[0].message.content"
