"""Whatever a streamed answer's chunks look like: every text in them is checked, by its path, and nothing is lost."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import shipped_policy
from aim_guardrail.streams.calls import Calls
from aim_guardrail.streams.events import StreamScreen
from aim_kserve.errors import UpstreamFailed
from aim_kserve.sse import EventReader
from guarded import ask, events, orders, said

KEY = "AKIA" + "3XPZ7QKLMN2VWTYB"
CARD = "4111 1111 1111 1111"
MAIL = "jane.doe@example.com"
TEXT = f"Use {KEY} and pay with {CARD}, then go."
SHOWN = "Use <SECRET_1> and pay with <CREDIT_CARD_1>, then go."
DONE = "data: [DONE]\n\n"
END = {"delta": {}, "finish_reason": "stop"}


def data(payload: Any) -> str:
    return f"data: {orjson.dumps(payload).decode()}\n\n"


def chat(*deltas: Any, end: Any = END) -> str:
    choices = [item if isinstance(item, dict) and "delta" in item else {"delta": item} for item in deltas]
    return "".join(data({"choices": [{"index": 0, **choice}]}) for choice in [*choices, end]) + DONE


def streamed(client: httpx.Client, raw: str) -> httpx.Response:
    return client.post("/v1/chat/completions", json=ask("hi", stream=True), headers=orders(raw=raw))


def deltas(got: list[Any]) -> list[dict[str, Any]]:
    assert got[-1] == "[DONE]"
    assert not [event for event in got[:-1] if "error" in event], got
    return [c["delta"] for event in got[:-1] for c in event.get("choices") or () if c.get("delta")]


def calls(got: list[Any]) -> dict[int, dict[str, Any]]:
    """A stream's tool calls, put together as OpenAI's client does: by index."""
    found: dict[int, dict[str, Any]] = {}
    for call in [call for delta in deltas(got) for call in delta.get("tool_calls") or ()]:
        mine = found.setdefault(call["index"], {"id": "", "name": "", "text": ""})
        part = call.get("function") or call.get("custom") or {}
        mine["id"] = mine["id"] or call.get("id") or ""
        mine["name"] += part.get("name") or ""
        text = part.get("arguments", part.get("input", ""))
        mine["text"] = text if isinstance(text, dict) else mine["text"] + text
    return found


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard.load(shipped_policy("values"))


def told(guard: Guard, raw: str) -> tuple[list[Any], str]:
    metrics = Metrics(CollectorRegistry())
    stream = StreamScreen(Screening(guard, metrics, RequestContext("/v1/chat/completions")), metrics)
    out = b"".join(stream.feed(event) for event in EventReader().feed(raw.encode())).decode()
    stream.close()
    return events(httpx.Response(200, text=out)), out


# --- tool calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_custom_tools_input_is_checked_and_delivered(client: httpx.Client, size: int) -> None:
    """https://github.com/openai/openai-openapi/issues/576"""
    first = {"index": 0, "id": "c", "type": "custom", "custom": {"name": "shell", "input": ""}}
    pieces = [TEXT[at : at + size] for at in range(0, len(TEXT), size)]
    rest = [{"tool_calls": [{"index": 0, "custom": {"input": piece}}]} for piece in pieces]
    answer = streamed(client, chat({"tool_calls": [first]}, *rest))
    assert calls(events(answer)) == {0: {"id": "c", "name": "shell", "text": SHOWN}}


def function(arguments: Any, name: str = "", **more: Any) -> dict[str, Any]:
    return {"function": {**({"name": name} if name else {}), "arguments": arguments}, **more}


@pytest.mark.parametrize("index", [{}, {"index": 0}], ids=["none", "all the same"])
def test_parallel_calls_are_kept_apart_by_their_ids(client: httpx.Client, index: dict[str, int]) -> None:
    """https://github.com/ollama/ollama/issues/7881"""
    pieces = [function('{"x":', "f", id="a", **index), function("1}", **index)]
    pieces += [function(f'{{"mail":"{MAIL}"}}', "g", id="b", **index)]
    answer = streamed(client, chat(*({"tool_calls": [piece]} for piece in pieces)))
    assert calls(events(answer)) == {
        0: {"id": "a", "name": "f", "text": '{"x":1}'},
        1: {"id": "b", "name": "g", "text": '{"mail":"<EMAIL_ADDRESS_1>"}'},
    }


def test_parallel_calls_in_one_chunk_are_kept_apart(client: httpx.Client) -> None:
    both = [function('{"x":1}', "f", id="a", index=0), function('{"y":2}', "g", id="b", index=0)]
    got = calls(events(streamed(client, chat({"tool_calls": both}))))
    assert [call["text"] for call in got.values()] == ['{"x":1}', '{"y":2}']


def test_arguments_that_are_an_object_are_checked(client: httpx.Client) -> None:
    """https://github.com/BerriAI/litellm/issues/24095"""
    said = {"mail": MAIL, "password": "hunter2-Xy7!qPz", "card": 4111111111111111, "n": 7}
    answer = streamed(client, chat({"tool_calls": [function(said, "f", id="a", index=0)]}))
    hidden = {"mail": "<EMAIL_ADDRESS_1>", "password": "<SECRET_1>", "card": "<CREDIT_CARD_1>", "n": 7}
    assert calls(events(answer))[0]["text"] == hidden


@pytest.mark.parametrize(
    ("pieces", "numbers"),
    [
        ([{"index": 0, "id": "a", "f": 1}, {"index": 0}, {"index": 1, "id": "b", "f": 1}, {"index": 0}], [0, 0, 1, 0]),
        ([{"index": 0, "id": "a", "f": 1}, {"index": 0, "id": "z"}, {"index": 0, "id": "y"}], [0, 0, 0]),
        ([{"id": "a", "f": 1}, {}, {"id": "b", "f": 1}, {}, {"id": "a"}], [0, 0, 1, 1, 0]),
        ([{"index": 0, "id": "a", "f": 1}, {"index": 0, "id": "b", "f": 1}, {"index": 0}], [0, 1, 1]),
        ([{"f": 1}, {}, {"f": 1}, {}], [0, 0, 1, 1]),
        ([{"index": 3, "id": "a", "f": 1}, {"index": 3}, {"index": "x"}, {"index": None}], [3, 3, 3, 3]),
    ],
)
def test_which_call_a_piece_belongs_to(pieces: list[dict[str, Any]], numbers: list[int]) -> None:
    told = Calls()
    got = [told.number({**piece, **({"function": {"name": "f"}} if piece.get("f") else {})}) for piece in pieces]
    assert got == numbers


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last", [{"delta": None}, {}, {"delta": {}}, {"delta": {"content": ""}}, {"delta": {"x": None}}]
)
def test_the_last_words_come_in_a_delta_before_the_end(client: httpx.Client, last: dict[str, Any]) -> None:
    raw = "".join(data({"choices": [{"index": 0, "delta": {"content": piece}}]}) for piece in ("one", " two"))
    raw += data({"choices": [{"index": 0, **last, "finish_reason": "stop"}]}) + DONE
    got = events(streamed(client, raw))
    assert "".join(delta.get("content") or "" for delta in deltas(got)) == "one two"
    reasons = [c.get("finish_reason") for event in got[:-1] for c in event["choices"]]
    assert reasons[-1] == "stop"
    assert not any(reasons[:-1])


@pytest.mark.parametrize("more", [{"content": MAIL}, {"reasoning": MAIL}, {"tool_calls": [function("{}", index=0)]}])
def test_what_comes_after_the_end_never_passes(client: httpx.Client, more: dict[str, Any]) -> None:
    answer = streamed(client, chat({"content": "well. "}, END, more))
    assert "example.com" not in answer.text
    assert answer.text.endswith(DONE)


# --- what lies around the data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Text/Event-Stream", "TEXT/EVENT-STREAM; charset=utf-8", " text/event-stream"])
def test_a_stream_is_one_however_its_type_is_written(client: httpx.Client, kind: str) -> None:
    told = orders(status=200, body=chat({"content": TEXT}), headers={"content-type": kind})
    answer = client.post("/v1/chat/completions", json=ask("hi", stream=True), headers=told)
    assert said(events(answer)) == SHOWN


@pytest.mark.parametrize(
    "line", [f"id: {KEY}", f"event: {KEY}", f": {KEY}", f"retry: {KEY}", f"x: {KEY}", f"event: {MAIL}"]
)
def test_lines_beside_the_data_say_nothing(client: httpx.Client, line: str) -> None:
    raw = chat({"content": "well. "}).replace("data:", f"{line}\ndata:", 1)
    answer = streamed(client, raw.replace("\n\n", f"\n{line}\n\n", 1))
    assert said(events(answer)) == "well. "
    assert line.split(" ", 1)[1] not in answer.text


def test_the_name_of_an_event_is_kept_where_it_is_a_word(client: httpx.Client) -> None:
    raw = "event: message\n" + chat({"content": "well. "})
    assert streamed(client, raw).text == raw


@pytest.mark.parametrize("form", ["unary", "stream"])
def test_an_answers_headers_are_checked(client: httpx.Client, form: str) -> None:
    said_there = {
        "x-note": f"to {MAIL}",
        "x-api-token": "hunter2-Xy7!qPz",
        "x-count": "7",
        "etag": '"4111111111111111"',
    }
    kind = "text/event-stream" if form == "stream" else "application/json"
    body = chat({"content": "well. "}) if form == "stream" else "{}"
    told = orders(status=200, body=body, headers={**said_there, "content-type": kind})
    headers = client.post("/v1/chat/completions", json=ask("hi"), headers=told).headers
    hidden = {
        "x-note": "to <EMAIL_ADDRESS_1>",
        "x-api-token": "<SECRET_1>",
        "x-count": "7",
        "etag": '"4111111111111111"',
    }
    assert {name: headers[name] for name in said_there} == hidden


@pytest.mark.parametrize("beat", ["data:\n\n", "data: \n\n", "data\n\n", ": hi\n\n", "event: ping\ndata:\n\n"])
def test_heartbeats_pass(client: httpx.Client, beat: str) -> None:
    raw = chat({"content": TEXT[:9]}, {"content": TEXT[9:]}).replace("\n\n", f"\n\n{beat}", 1)
    answer = streamed(client, beat + raw)
    assert said(events(answer)) == SHOWN
    assert answer.text.startswith(":\n\n") == beat.startswith((":", "data:"))
    assert answer.text.endswith(DONE)


# --- what else a chunk may hold -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [{"choices": None}, {}, {"choices": []}])
@pytest.mark.parametrize("first", [True, False])
def test_a_chunk_without_choices_passes_and_is_checked(
    client: httpx.Client, chunk: dict[str, Any], first: bool
) -> None:
    about = {"id": "c", "object": "chat.completion.chunk", **chunk, "usage": {"n": 1}, "note": f"to {MAIL}"}
    raw = data(about) + chat({"content": TEXT}) if first else chat({"content": TEXT}).replace(DONE, data(about) + DONE)
    answer = streamed(client, raw)
    got = [event for event in events(answer)[:-1] if "note" in event]
    assert got == [{**about, "note": "to <EMAIL_ADDRESS_1>"}]
    assert said([event for event in events(answer) if event == "[DONE]" or event.get("choices")]) == SHOWN


def test_an_error_in_old_form_passes_checked(client: httpx.Client) -> None:
    error = {"object": "error", "message": f"cannot mail {MAIL}", "code": 400}
    answer = streamed(client, data(error) + DONE)
    assert events(answer) == [{**error, "message": "cannot mail <EMAIL_ADDRESS_1>"}, "[DONE]"]


def test_annotations_are_checked_where_they_stand(client: httpx.Client) -> None:
    def cited(title: str) -> dict[str, Any]:
        citation = {"url": f"https://x.org/?a={title}", "title": title, "start_index": 0, "end_index": 3}
        return {"annotations": [{"type": "url_citation", "url_citation": citation}]}

    answer = streamed(client, chat({"content": "see [1]"}, cited("one"), cited(MAIL), cited("two")))
    got = [delta["annotations"][0] for delta in deltas(events(answer)) if "annotations" in delta]
    assert got == [cited(title)["annotations"][0] for title in ("one", "<EMAIL_ADDRESS_1>", "two")]


def test_reasoning_details_are_checked_piece_by_piece(client: httpx.Client) -> None:
    def detail(text: str, index: int) -> dict[str, Any]:
        return {"type": "reasoning.text", "text": text, "index": index, "format": "x", "id": f"r{index}"}

    pieces = [(TEXT[:9], 0), ("to jane.", 1), (TEXT[9:30], 0), ("doe@example.com", 1), (TEXT[30:], 0)]
    answer = streamed(client, chat(*({"reasoning_details": [detail(*piece)]} for piece in pieces)))
    texts = {0: "", 1: ""}
    for item in [item for delta in deltas(events(answer)) for item in delta.get("reasoning_details") or ()]:
        assert item["type"] == "reasoning.text"
        texts[item["index"]] += item["text"]
    assert texts == {0: SHOWN, 1: "to <EMAIL_ADDRESS_1>"}


def mistral(kind: str, text: str) -> dict[str, Any]:
    part = {"type": "text", "text": text}
    return {"content": [part if kind == "text" else {"type": "thinking", "thinking": [part]}]}


def appended(got: list[Any]) -> list[tuple[str, str]]:
    """What a client makes of parts that follow each other."""
    parts: list[tuple[str, str]] = []
    for content in [delta["content"] for delta in deltas(got) if delta.get("content")]:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            text = part["text"] if part["type"] == "text" else "".join(inner["text"] for inner in part["thinking"])
            if parts and parts[-1][0] == part["type"]:
                parts[-1] = part["type"], parts[-1][1] + text
            elif text:
                parts.append((part["type"], text))
    return parts


@pytest.mark.parametrize("cut", [3, 9, 30, 41])
def test_content_may_be_a_list_of_parts(client: httpx.Client, cut: int) -> None:
    thought = [mistral("thinking", text) for text in (f"to {MAIL[:6]}", f"{MAIL[6:]} or no")]
    answer = streamed(client, chat(*thought, mistral("text", TEXT[:cut]), {"content": TEXT[cut:]}))
    assert appended(events(answer)) == [("thinking", "to <EMAIL_ADDRESS_1> or no"), ("text", SHOWN)]


def test_a_transcript_is_checked_and_sound_passes(client: httpx.Client) -> None:
    pieces = [{"audio": {"id": "a", "transcript": TEXT[:8]}}, {"audio": {"data": "UklGRgAA"}}]
    answer = streamed(client, chat(*pieces, {"audio": {"transcript": TEXT[8:]}}))
    got = [delta["audio"] for delta in deltas(events(answer)) if "audio" in delta]
    assert "".join(audio.get("transcript", "") for audio in got) == SHOWN
    assert [audio["data"] for audio in got if audio.get("data")] == ["UklGRgAA"]


@pytest.mark.parametrize("where", ["content", "arguments"])
def test_a_character_may_be_split_over_two_chunks(client: httpx.Client, where: str) -> None:
    raw = chat({"content": "a 1"}, {"content": f"2 to {MAIL}"})
    if where == "arguments":
        raw = chat({"tool_calls": [function('{"a":"1', "f", index=0)]}, {"tool_calls": [function('2"}', index=0)]})
    answer = streamed(client, raw.replace('1"', r'\ud83d"', 1).replace('"2', r'"\ude00', 1))
    got = events(answer)
    if where == "content":
        assert said(got) == "a \N{GRINNING FACE} to <EMAIL_ADDRESS_1>"
    else:
        assert calls(got)[0]["text"] == '{"a":"\N{GRINNING FACE}"}'


@pytest.mark.parametrize(("half", "shown"), [(r"x\ud83d", "x\ufffd"), (r"\ude00x", "\ufffdx"), (r"\ud83dx", "\ufffdx")])
def test_half_a_character_is_shown_as_none(client: httpx.Client, half: str, shown: str) -> None:
    answer = streamed(client, chat({"content": "?"}).replace("?", half))
    assert said(events(answer)) == shown


@pytest.mark.parametrize(
    ("delta", "code"),
    [
        ({"tool_calls": [function("{", "f", id=str(n), index=n) for n in range(600)]}, "unsupported_stream"),
        ({"x": {f"k{n}": MAIL for n in range(600)}}, "unsupported_stream"),
        (orjson.loads('{"x":' * 250 + f'"{MAIL}"' + "}" * 250), "predictor_invalid"),
        (orjson.loads('{"x":' + "[" * 250 + f'"{MAIL}"' + "]" * 250 + "}"), "predictor_invalid"),
    ],
    ids=["calls", "fields", "objects", "lists"],
)
def test_what_a_choice_holds_is_bounded(guard: Guard, delta: dict[str, Any], code: str) -> None:
    with pytest.raises(UpstreamFailed) as refused:
        told(guard, chat(delta))
    assert refused.value.code == code


def test_the_choices_of_a_stream_are_bounded(guard: Guard) -> None:
    def chunks(count: int) -> str:
        return "".join(data({"choices": [{"index": at, "delta": {"content": "x"}}]}) for at in range(count)) + DONE

    assert told(guard, chunks(512))
    with pytest.raises(UpstreamFailed, match="more than 512 choices"):
        told(guard, chunks(513))


# --- long runs ------------------------------------------------------------------------------------------------------

RUNS = {
    "counting": " ".join(map(str, range(1, 401))),
    "digits": "".join(str(n * 7 % 10) for n in range(1100)),
    "url": "https://example.org/a?b=" + "c1-d2." * 200,
    "dashes": "-" * 1200,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_long_run_streams_as_it_is_checked_whole(client: httpx.Client, name: str) -> None:
    text = f"so: {RUNS[name]} and on"
    whole = client.post("/v1/chat/completions", json=ask("hi"), headers=orders(say=text))
    assert whole.json()["choices"][0]["message"]["content"] == text
    told = orders(tokens=[text[at : at + 5] for at in range(0, len(text), 5)])
    answer = client.post("/v1/chat/completions", json=ask("hi", stream=True), headers=told)
    assert said(events(answer)) == text


# --- every split ----------------------------------------------------------------------------------------------------


PLACES = {
    "content": lambda text: {"content": text},
    "reasoning": lambda text: {"reasoning_content": text},
    "arguments": lambda text: {"tool_calls": [function(text, index=0)]},
    "input": lambda text: {"tool_calls": [{"index": 0, "custom": {"input": text}}]},
    "parts": lambda text: mistral("text", text),
    "strings": lambda text: {"content": ["", text]},
    "two parts": lambda text: {"content": [{"type": "text", "text": part} for part in (text[:5], text[5:])]},
    "details": lambda text: {"reasoning_details": [{"type": "reasoning.text", "index": 0, "text": text}]},
    "new": lambda text: {"thoughts": {"deep": [{"index": 2, "note": text}]}},
}


def strings(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(strings(item) for key, item in value.items() if key not in ("type", "role"))
    return "".join(map(strings, value)) if isinstance(value, list) else value if isinstance(value, str) else ""


@pytest.mark.parametrize("place", PLACES)
def test_nothing_leaks_at_any_split_of_any_text(guard: Guard, place: str) -> None:
    """At every split, nothing that goes out, at any time, is more than a beginning of what is shown of the whole."""
    said_there, shown = (f'{{"a":"{TEXT}"}}', f'{{"a":"{SHOWN}"}}') if place == "arguments" else (TEXT, SHOWN)
    for cut in range(1, len(said_there)):
        got, out = told(guard, chat(*map(PLACES[place], (said_there[:cut], said_there[cut:]))))
        assert strings(deltas(got)) == shown, cut
        assert KEY[:8] not in out
        assert "1111" not in out
