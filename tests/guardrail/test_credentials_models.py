"""Which models a caller may use in front of a predictor that knows no callers: the transformer decides."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_guardrail.asked import check_asked, usable_only
from aim_kserve.errors import Forbidden, NotFound
from aim_kserve.identity import Caller, keys, set_caller
from aim_kserve.kserve import pb, pb_grpc
from fake_predictor import FakePredictor
from guarded import ask, guardrail
from served import Served

CHAT, COMPLETIONS = "/v1/chat/completions", "/openai/v1/completions"
HTTP = httpx.Client(timeout=20)  # one for all: each loads what it trusts


@pytest.fixture(scope="module", autouse=True)
def _closing() -> Iterator[None]:
    yield
    HTTP.close()


@contextlib.contextmanager
def as_caller(*patterns: str) -> Iterator[None]:
    set_caller(Caller("k", "t", frozenset(["infer"]), models=patterns))
    try:
        yield
    finally:
        set_caller(None)


@pytest.mark.parametrize(
    ("path", "body", "usable"),
    [
        (CHAT, {"model": "m"}, True),
        (CHAT, {"model": "other"}, False),
        (CHAT, {}, True),  # the predictor's own model
        ("/v1/models/m:predict", {"model": "other"}, True),
        ("/v1/models/other:predict", {"model": "m"}, False),
        ("/openai/v1/models/other", None, False),
        ("/v2/models/org/m/infer", None, True),
        ("/v2/models/org/other/versions/1/infer", None, False),
        ("/V2/Models/other/infer", None, False),
        ("/v2/models/other", None, False),
        ("/tokenize", {"prompt": "x"}, True),
        ("/tokenize", {"prompt": "x", "model": "other"}, False),
    ],
)
def test_which_model_is_meant(path: str, body: Any, usable: bool) -> None:
    with as_caller("m", "org/m"), contextlib.nullcontext() if usable else pytest.raises(Forbidden):
        check_asked(path, b"" if body is None else orjson.dumps(body), "m")


@pytest.mark.parametrize("path", ["/v1//chat/completions", "/v2/x/../models/other/infer", "/v2/models;a=b/other"])
def test_a_path_that_two_servers_read_differently_is_none(path: str) -> None:
    with as_caller("m"), pytest.raises(NotFound):
        check_asked(path, b"{}", "m")


@given(st.text("ab/", min_size=1, max_size=6), st.sampled_from(["", ":predict", "/infer", "/versions/3/infer"]))
def test_no_other_name_is_read_from_a_path(name: str, what: str) -> None:
    """Whatever stands there: it is the model's, or is refused."""
    with as_caller("m"), pytest.raises((Forbidden, NotFound)):
        check_asked(f"/v2/models/{name}{what}", b"", "m")


def test_a_list_of_models_is_shortened() -> None:
    listed = {"object": "list", "data": [{"id": "m"}, {"id": "other"}, 7], "models": ["m", "other"]}
    with as_caller("m"):
        assert usable_only(listed)
        assert listed == {"object": "list", "data": [{"id": "m"}], "models": ["m"]}
        assert not usable_only(listed)
        assert not usable_only([1])


# --- in the process ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Key of ``own``, of ``other`` and of ``all``; the file is at ``""``."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    texts = {"": str(file)}
    for name, models in {"own": ["m"], "other": ["x*"], "all": None}.items():
        texts[name], entry = keys.new_key(name, tenant="t", models=models)
        keys.add(file, entry)
    texts["operator"], entry = keys.new_key("operator", tenant="t", scopes=["infer", "admin"])
    keys.add(file, entry)
    return texts


@pytest.fixture(scope="module", params=[True, False], ids=["prompts checked", "answers checked"])
def closed(
    request: pytest.FixtureRequest, predictor: FakePredictor, texts: dict[str, str], tmp_path_factory: Any
) -> Iterator[Served]:
    policy = tmp_path_factory.mktemp("policy") / "policy.yaml"
    prompt, answer = ("[{type: secrets, action: block}]", "[]")[:: 1 if request.param else -1]
    policy.write_text(f"version: 1\nname: p\nprompt: {prompt}\nanswer: {answer}\n")
    with guardrail(predictor.host, "--policy", str(policy), "--api_keys", texts[""]) as server:
        yield server


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ask("hi")),
        (CHAT, ask("hi", stream=True)),
        (COMPLETIONS, {"prompt": "hi"}),
        ("/v1/models/m:predict", {"instances": ["hi"]}),
        ("/v2/models/m/infer", {"inputs": [{"name": "p", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}),
        ("/tokenize", {"prompt": "x"}),
    ],
)
def test_every_way_in_is_closed_to_who_may_not(
    closed: Served, predictor: FakePredictor, texts: dict[str, str], path: str, body: Any
) -> None:
    before = len(predictor.seen)
    refused = HTTP.post(closed.url + path, json=body, headers=bearer(texts["other"]))
    assert refused.status_code == 403
    assert len(predictor.seen) == before
    said = refused.json()["error"]
    assert "this credential may not use it" in (said["message"] if isinstance(said, dict) else said)
    for name in ("own", "all"):
        assert HTTP.post(closed.url + path, json=body, headers=bearer(texts[name])).status_code == 200
    assert len(predictor.seen) == before + 2


def test_a_model_given_twice_is_the_one_that_was_looked_at(
    closed: Served, predictor: FakePredictor, texts: dict[str, str]
) -> None:
    body = b'{"mod\\u0065l": "secret", "messages": [{"role": "user", "content": "hi"}], "model": "m"}'
    answer = HTTP.post(closed.url + CHAT, content=body, headers=bearer(texts["own"]))
    assert answer.status_code == 200
    assert b"secret" not in predictor.last["body"]


SECRET = orjson.dumps({"model": "secret", "messages": [{"role": "user", "content": "hi"}]})


@pytest.mark.parametrize("path", [CHAT, "/v1/audio/transcriptions"])
@pytest.mark.parametrize(
    "body",
    [
        SECRET.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + SECRET,
        b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nsecret\r\n--b--\r\n',
        b"model=secret",
        b"[" + SECRET + b"]",
        SECRET + b" ",
        b'{"model": "m", "model": "secret"}',
        b'{"model": ["secret"]}',
    ],
    ids=["UTF-16", "with a mark", "form", "query", "list", "JSON", "twice", "a list of names"],
)
@pytest.mark.parametrize("length", ["0", "2", "whole"])
def test_no_body_hides_the_model_it_is_for(
    closed: Served, predictor: FakePredictor, texts: dict[str, str], path: str, body: bytes, length: str
) -> None:
    """A server that reads bytes as it likes gets none that we cannot read, whatever the headers say they are."""
    before = len(predictor.seen)
    binary = {"inference-header-content-length": str(len(body)) if length == "whole" else length}
    for kind in ("application/json", "application/octet-stream", "multipart/form-data; boundary=b"):
        answer = HTTP.post(
            closed.url + path, content=body, headers={**bearer(texts["own"]), **binary, "content-type": kind}
        )
        assert answer.status_code in (400, 403, 415), answer.text
    assert len(predictor.seen) == before


def test_the_list_shows_what_may_be_used(closed: Served, texts: dict[str, str]) -> None:
    shown = {
        name: [card["id"] for card in HTTP.get(f"{closed.url}/v1/models", headers=bearer(texts[name])).json()["data"]]
        for name in ("own", "other", "all")
    }
    assert shown == {"own": ["m"], "other": [], "all": ["m"]}


def test_over_grpc(closed: Served, texts: dict[str, str]) -> None:
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hi")
    with grpc.insecure_channel(closed.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ModelInfer(message, metadata=list(bearer(texts["own"]).items()), timeout=20).outputs
        for call in (
            lambda given: stub.ModelInfer(message, metadata=given, timeout=20),
            lambda given: stub.ModelMetadata(pb.ModelMetadataRequest(name="m"), metadata=given, timeout=20),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(list(bearer(texts["other"]).items()))
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/v1//load_lora_adapter", "/openai/v1/./unload_LoRA_adapter;x"]
)
def test_what_changes_the_predictor_is_not_served_however_it_is_spelt(
    closed: Served, predictor: FakePredictor, texts: dict[str, str], path: str
) -> None:
    before = len(predictor.seen)
    connection = http.client.HTTPConnection("127.0.0.1", closed.http_port, timeout=20)  # sends paths as they are
    try:
        connection.request("POST", path, b'{"lora_name": "x", "lora_path": "/x"}', bearer(texts["operator"]))
        assert connection.getresponse().status == 404
    finally:
        connection.close()
    assert len(predictor.seen) == before
