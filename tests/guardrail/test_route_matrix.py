"""Route × mode: each is checked in both directions or refused with a reason; nothing is waved through.

A planted secret and a finding of a batch detector go each way through the real transformer.
`docs/guardrails-streams.md` has the table, which must be this file's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import orjson
import pytest

from aim_guardrail.protocols.v2 import pack
from aim_kserve.kserve import pb, pb_grpc
from fake_predictor import FakePredictor
from guarded import guardrail, orders
from served import Served

PAGE = Path(__file__).parents[2] / "docs/guardrails-streams.md"
KEY = "AKIA" + "3XPZ7QKLMN2VWTYB"
MAIL = "jane.doe@example.com"
DONE = "data: [DONE]\n\n"
Json = dict[str, Any]

RULES = """version: 2
name: matrix
budget_ms: 5000
prompt:
  - {type: secrets, action: block}
  - {type: pii, action: redact}
  - {type: words, action: {BAD: block, MILD: redact}}
answer:
  - {type: secrets, action: redact}
  - {type: pii, action: redact}
  - {type: words, action: {BAD: block, MILD: redact}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, predictor: FakePredictor) -> Iterator[Served]:
    policy = tmp_path_factory.mktemp("matrix") / "policy.yaml"
    policy.write_text(RULES)
    flags = ["--model_name", "m", "--predictor_host", predictor.host, "--policy", str(policy)]
    with Served(["-m", "word_family", *flags]) as server:
        yield server


def event(payload: Json) -> str:
    name = f"event: {payload['type']}\n" if "type" in payload else ""
    return f"{name}data: {orjson.dumps(payload).decode()}\n\n"


def chunks(*choices: Json, **more: Any) -> str:
    return "".join(event({**more, "choices": [{"index": 0, **choice}]}) for choice in choices) + DONE


def halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def chat_events(text: str) -> str:
    said = [{"delta": {"content": half}, "finish_reason": None} for half in halves(text)]
    return chunks(*said, {"delta": {}, "finish_reason": "stop"})


def completion_events(text: str) -> str:
    said = [{"text": half, "finish_reason": None} for half in halves(text)]
    return chunks(*said, {"text": "", "finish_reason": "stop"})


def response_events(text: str) -> str:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    said = [event({"type": "response.output_text.delta", **place, "delta": half}) for half in halves(text)]
    first = event({"type": "response.created", "response": {"id": "resp_1", "output": []}})
    done = event({"type": "response.output_text.done", **place, "text": text})
    return (
        first + "".join(said) + done + event({"type": "response.completed", "response": {"id": "resp_1", "output": []}})
    )


def message_events(text: str) -> str:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "usage": {"output_tokens": 1}}
    said = [
        event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": half}})
        for half in halves(text)
    ]
    first = event({"type": "message_start", "message": message})
    first += event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    last = event({"type": "content_block_stop", "index": 0})
    last += event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}})
    return first + "".join(said) + last + event({"type": "message_stop"})


def transcript_events(text: str) -> str:
    said = [event({"type": "transcript.text.delta", "delta": half}) for half in halves(text)]
    return "".join(said) + event({"type": "transcript.text.done", "text": text})


def unknown_events(text: str) -> str:
    return event({"said": text}) + DONE


@dataclass(frozen=True)
class Route:
    """One HTTP route.

    Attributes:
        asked: a body with a text where the protocol has one; of a request for a stream, `stream` is added.
        answered: a predictor's answer with a text where the protocol, or somebody who does not keep to it, has one.
        events: the same, streamed; `unknown_events`: the route has no stream, and one is refused.
    """

    name: str
    path: str
    asked: Callable[[str], Json]
    answered: Callable[[str], Json]
    events: Callable[[str], str] = unknown_events


def v2(text: str) -> Json:
    return {"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}


ROUTES = [
    Route(
        "chat",
        "/v1/chat/completions",
        lambda text: {"messages": [{"role": "user", "content": text}]},
        lambda text: {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]},
        chat_events,
    ),
    Route(
        "completions",
        "/openai/v1/completions",
        lambda text: {"prompt": ["hi", text]},
        lambda text: {"choices": [{"index": 0, "text": text}]},
        completion_events,
    ),
    Route(
        "responses",
        "/v1/responses",
        lambda text: {"input": [{"role": "user", "content": [{"type": "input_text", "text": text}]}]},
        lambda text: {"output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}]},
        response_events,
    ),
    Route(
        "messages (Anthropic)",
        "/v1/messages",
        lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 9},
        lambda text: {"type": "message", "content": [{"type": "text", "text": text}], "stop_reason": "end_turn"},
        message_events,
    ),
    Route(
        "audio transcriptions, as JSON",
        "/v1/audio/transcriptions",
        lambda text: {"prompt": text, "url": "https://x.org/a.wav"},
        lambda text: {"text": text, "segments": [{"text": text}]},
        transcript_events,
    ),
    Route(
        "embeddings",
        "/v1/embeddings",
        lambda text: {"input": ["hi", text]},
        lambda text: {"data": [{"object": "embedding", "embedding": [0.5, 1.0], "note": text}]},
    ),
    Route(
        "score",
        "/score",
        lambda text: {"text_1": "hi", "text_2": [text]},
        lambda text: {"data": [{"index": 0, "score": 0.5, "text": text}]},
    ),
    Route(
        "rerank",
        "/v1/rerank",
        lambda text: {"query": "hi", "documents": [text]},
        lambda text: {"results": [{"index": 0, "relevance_score": 0.5, "document": {"text": text}}]},
    ),
    Route(
        "classify",
        "/classify",
        lambda text: {"input": text},
        lambda text: {"data": [{"index": 0, "label": text, "probs": [0.5, 0.5]}]},
    ),
    Route(
        "pooling",
        "/pooling",
        lambda text: {"input": text},
        lambda text: {"data": [{"object": "pooling", "data": [[0.5, 1.0]], "note": text}]},
    ),
    Route(
        "tokenize",
        "/tokenize",
        lambda text: {"prompt": text},
        lambda text: {"tokens": [1, 2], "token_strs": ["a", text]},
    ),
    Route("detokenize", "/detokenize", lambda text: {"tokens": [1], "note": text}, lambda text: {"prompt": text}),
    Route(
        "V1 :predict",
        "/v1/models/m:predict",
        lambda text: {"instances": [{"prompt": text}]},
        lambda text: {"predictions": [{"text": text}]},
    ),
    Route(
        "V1 :explain",
        "/v1/models/m:explain",
        lambda text: {"instances": [text]},
        lambda text: {"explanations": [[text]]},
    ),
    Route(
        "V2 REST, JSON",
        "/v2/models/m/infer",
        lambda text: {"inputs": [v2(text)]},
        lambda text: {"model_name": "m", "outputs": [v2(text)]},
    ),
    Route(
        "V2 generate (Triton)",
        "/v2/models/m/generate_stream",
        lambda text: {"text_input": text},
        lambda text: {"text_output": text},
    ),
    Route(
        "a route that nobody knows",
        "/v9/think",
        lambda text: {"a": [{"b": text}]},
        lambda text: {"c": {"d": [text]}},
    ),
]
NAMES = [route.name for route in ROUTES]
MODES = ["unary", "streamed"]


def asks(server: Served, route: Route, mode: str, text: str, said: str) -> httpx.Response:
    """Send ``text``, be answered ``said``."""
    body = {"model": "m", **route.asked(text), **({"stream": True} if mode == "streamed" else {})}
    if mode == "unary":
        answer = orjson.dumps(route.answered(said)).decode()
        told = orders(status=200, body=answer, headers={"content-type": "application/json"})
    else:
        told = orders(raw=route.events(said))
    return httpx.post(server.url + route.path, json=body, headers=told, timeout=20)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("route", ROUTES, ids=NAMES)
def test_what_is_asked(server: Served, predictor: FakePredictor, route: Route, mode: str) -> None:
    for text in (f"so {KEY} it is", "so badword it is"):
        before = len(predictor.seen)
        answer = asks(server, route, mode, text, "fine.")
        assert answer.status_code == 400, (route.name, text)
        assert "blocked by the guardrail" in answer.text
        assert len(predictor.seen) == before
    answer = asks(server, route, mode, f"to {MAIL} or mildword", "fine.")
    assert answer.status_code == 200
    sent = predictor.last["body"].decode()
    assert "<EMAIL_ADDRESS_1>" in sent
    assert "<MILD_1>" in sent
    assert MAIL not in sent


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("route", ROUTES, ids=NAMES)
def test_what_is_answered(server: Served, route: Route, mode: str) -> None:
    refused = mode == "streamed" and route.events is unknown_events
    answer = asks(server, route, mode, "hi", f"so {KEY} or mildword it is. ")
    assert answer.status_code == 200
    assert KEY not in answer.text
    assert "mildword" not in answer.text
    if refused:
        assert "cannot be checked" in answer.text
        assert "so " not in answer.text
    else:
        assert "<SECRET_1>" in "".join(answer.text.split("\n")) or "<SECRET_1>" in joined(answer.text)
        assert "<MILD_1>" in joined(answer.text)
    answer = asks(server, route, mode, "hi", "so badword it is. ")
    assert "badword" not in answer.text
    assert "badword" not in joined(answer.text)
    reasons = ("content_filter", "refusal", "blocked by the guardrail", "cannot be checked")
    assert any(reason in answer.text for reason in reasons)
    answer = asks(server, route, mode, "hi", "all is fine. ")
    assert answer.status_code == 200
    assert refused or "all is fine. " in joined(answer.text)


def joined(raw: str) -> str:
    """All strings of an answer one after the other."""
    lines = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: {")]
    said: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                if name not in ("type", "id", "item_id", "finish_reason"):
                    look(item)
        elif isinstance(value, list):
            for item in value:
                look(item)
        elif isinstance(value, str):
            said.append(value)

    for line in lines or [raw]:
        look(orjson.loads(line))
    return "".join(said)


# --- what is not JSON, or not HTTP ----------------------------------------------------------------------------------


def binary(kind: str, text: str) -> tuple[bytes, dict[str, str]]:
    raw = pack([b"hi", text.encode()])
    tensor = {"name": "t", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = orjson.dumps({"model_name": "m", kind: [tensor]})
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    return head + raw, headers


def test_v2_binary(server: Served, predictor: FakePredictor) -> None:
    def infer(text: str, said: str = "fine.") -> httpx.Response:
        body, headers = binary("inputs", text)
        answer, head = binary("outputs", said)
        told = orders(status=200, body=answer.decode("latin-1"), headers=head)
        return httpx.post(f"{server.url}/v2/models/m/infer", content=body, headers={**headers, **told})

    for text in (f"so {KEY}", "so badword"):
        assert infer(text).status_code == 400
    assert infer(f"to {MAIL} mildword").status_code == 200
    assert predictor.last["body"].endswith(pack([b"hi", b"to <EMAIL_ADDRESS_1> <MILD_1>"]))
    assert infer("hi", f"so {KEY} mildword").content.endswith(pack([b"hi", b"so <SECRET_1> <MILD_1>"]))
    assert infer("hi", "so badword").status_code == 400
    body, headers = binary("inputs", "hi")
    told = orders(raw=unknown_events(KEY))
    streamed = httpx.post(f"{server.url}/v2/models/m/infer", content=body, headers={**headers, **told})
    assert "cannot be checked" in streamed.text
    assert KEY not in streamed.text


@pytest.fixture
def stub(server: Served) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc_url) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def test_v2_grpc(stub: Any, predictor: FakePredictor) -> None:
    def infer(text: str, said: str = "fine.") -> bytes:
        asked = pb.ModelInferRequest(model_name="m")
        asked.inputs.add(name="t", datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
        answer = orjson.dumps({"model_name": "m", "outputs": [v2(said)]}).decode()
        told = orders(status=200, body=answer, headers={"content-type": "application/json"})
        got = stub.ModelInfer(asked, timeout=20, metadata=list(told.items()))
        return b"".join([*got.raw_output_contents, *got.outputs[0].contents.bytes_contents])

    for text in (f"so {KEY}", "so badword"):
        with pytest.raises(grpc.RpcError) as refused:
            infer(text)
        assert refused.value.code().name == "INVALID_ARGUMENT"
    infer(f"to {MAIL} mildword")
    assert b"<EMAIL_ADDRESS_1> <MILD_1>" in predictor.last["body"]
    assert b"so <SECRET_1> <MILD_1>" in infer("hi", f"so {KEY} mildword")
    with pytest.raises(grpc.RpcError) as refused:
        infer("hi", "so badword")
    assert "blocked by the guardrail" in refused.value.details()


def test_a_grpc_stream_is_refused(server: Served) -> None:
    """KServe's service has no stream; Triton's method of that name is none of it."""
    with grpc.insecure_channel(server.grpc_url) as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        with pytest.raises(grpc.RpcError) as refused:
            list(stream(iter([b""]), timeout=20))
    assert refused.value.code().name == "UNIMPLEMENTED"


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations", "/v9/think"])
def test_what_is_no_json_is_refused(server: Served, predictor: FakePredictor, path: str) -> None:
    before = len(predictor.seen)
    answer = httpx.post(server.url + path, files={"file": ("a.wav", b"RIFF")}, data={"prompt": "hi"})
    assert answer.status_code == 415
    assert "multipart/form-data" in answer.text
    assert len(predictor.seen) == before


def test_a_form_passes_where_only_answers_are_judged(tmp_path: Path, predictor: FakePredictor) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 2\nname: t\nanswer: [{type: secrets, action: redact}]\n")
    form = {"files": {"file": ("a.wav", b"RIFF")}, "data": {"response_format": "srt"}}
    with guardrail(predictor.host, "--policy", str(policy)) as server:
        for kind, said, shown in (
            ("application/json", orjson.dumps({"text": f"so {KEY}"}).decode(), '{"text":"so <SECRET_1>"}'),
            ("text/plain", f"so {KEY}", "so <SECRET_1>"),
        ):
            told = orders(status=200, body=said, headers={"content-type": kind})
            answer = httpx.post(f"{server.url}/v1/audio/transcriptions", **form, headers=told)
            assert (answer.status_code, answer.text) == (200, shown)
            assert b"RIFF" in predictor.last["body"]


def test_a_query_is_judged_as_a_body_is(server: Served, predictor: FakePredictor) -> None:
    for text in (KEY, "badword", "badword=1&a"):
        assert httpx.get(f"{server.url}/v9/think?q={text}").status_code == 400
    httpx.get(f"{server.url}/v9/think?q=to+{MAIL}&n=mildword")
    assert predictor.last["path"].endswith("?q=to+%3CEMAIL_ADDRESS_1%3E&n=%3CMILD_1%3E")


def test_token_ids_are_refused(server: Served) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": [1, 2]}),
        ("/inference/v1/generate", {"token_ids": [1, 2]}),
        ("/pooling", {"input": [[1, 2]]}),
    ):
        answer = httpx.post(server.url + path, json=body)
        assert answer.status_code == 400
        assert "token ids cannot be checked" in answer.text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-subrip", "image/svg+xml", "text/html"])
def test_answers_that_are_no_json_are_checked(server: Served, kind: str) -> None:
    def said(text: str) -> httpx.Response:
        told = orders(status=200, body=text, headers={"content-type": kind})
        return httpx.post(f"{server.url}/v1/audio/transcriptions", json={"url": "https://x.org/a.wav"}, headers=told)

    assert said(f"1\n00:00 --> 00:01\nso {KEY} mildword\n").text == "1\n00:00 --> 00:01\nso <SECRET_1> <MILD_1>\n"
    assert said("so badword").status_code == 400


# --- the table ------------------------------------------------------------------------------------------------------


def table() -> list[str]:
    """The matrix as the page has it."""
    rows = ["| route | unary | streamed |", "|---|---|---|"]
    for route in ROUTES:
        streamed = "checked" if route.events is not unknown_events else "refused: a stream of unknown form"
        rows.append(f"| {route.name} | checked | {streamed} |")
    rows.append("| V2 REST, binary | checked | refused: a stream of unknown form |")
    rows.append("| V2 gRPC | checked | refused: `UNIMPLEMENTED` |")
    rows.append("| bodies that are not JSON (multipart, compressed), any route | refused: 415 | refused: 415 |")
    rows.append("| token ids or embeddings in place of a prompt, any route | refused: 400 | refused: 400 |")
    return rows


def test_the_page_has_this_table() -> None:
    lines = [*PAGE.read_text().splitlines(), ""]
    start = lines.index(table()[0])
    assert lines[start : start + len(table())] == table()
    assert not lines[start + len(table())].startswith("|")
