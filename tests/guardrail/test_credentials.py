"""Whose credential reaches the predictor: on every way there is to it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_guardrail.credentials import Credentials, Hidden
from aim_guardrail.settings import GuardrailSettings
from aim_kserve.identity.key_file import KeyFile, read_key
from aim_kserve.kserve import pb, pb_grpc
from aim_kserve.settings import SettingsError
from fake_predictor import FakePredictor
from guarded import ask, eventually, guardrail, orders
from served import Served

CLIENTS = {"authorization": "Bearer client-secret", "x-api-key": "client-secret", "api-key": "client-secret"}
OWN = "own-secret-1"
HTTP = httpx.Client(timeout=20)  # one for all: each loads what it trusts


@pytest.fixture(scope="module", autouse=True)
def _closing() -> Iterator[None]:
    yield
    HTTP.close()


@pytest.fixture(scope="module")
def forwarding(predictor: FakePredictor) -> Iterator[Served]:
    with guardrail(
        predictor.host,
        *("--predictor_credentials", "forward"),
        *("--predictor_grpc_host", f"127.0.0.1:{predictor.grpc_port}"),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "key"
    file.write_text(f"{OWN}\n")
    return file


@pytest.fixture(scope="module")
def with_own_key(predictor: FakePredictor, key_file: Path) -> Iterator[Served]:
    with guardrail(
        predictor.host,
        *("--predictor_api_key_file", str(key_file)),
        *("--predictor_grpc_host", f"127.0.0.1:{predictor.grpc_port}"),
        *("--enable_predictor_health_check", "true"),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def to_grpc_only(predictor: FakePredictor, key_file: Path) -> Iterator[Served]:
    """Whose V2 REST goes on as gRPC."""
    with guardrail(f"127.0.0.1:{predictor.grpc_port}", "--predictor_protocol", "grpc-v2") as server:
        yield server


V2 = {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}
#: Every kind of way: checked, streamed, KServe's protocols, routes that are passed on as they are.
ROUTES: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/v1/chat/completions", ask("hi")),
    ("POST", "/v1/chat/completions", ask("hi", stream=True)),
    ("POST", "/openai/v1/completions", {"model": "m", "prompt": "hi"}),
    ("POST", "/v1/responses", {"model": "m", "input": "hi", "stream": True}),
    ("POST", "/v1/embeddings", {"model": "m", "input": "hi"}),
    ("POST", "/v1/models/m:predict", {"instances": ["hi"]}),
    ("POST", "/v2/models/m/infer", V2),
    ("GET", "/v2/models/m", None),
    ("GET", "/v1/models", None),
    ("POST", "/tokenize", {"prompt": "hi"}),
    ("DELETE", "/v1/files/f", None),
]


def credentials_of(seen: dict[str, Any]) -> dict[str, str]:
    sent = {key.lower(): value for key, value in seen["headers"]}
    return {name: value for name, value in sent.items() if name in CLIENTS or "secret" in str(value)}


def asked(server: Served, predictor: FakePredictor, method: str, path: str, body: Any) -> dict[str, str]:
    """What of credentials reached the predictor."""
    before = len(predictor.seen)
    HTTP.request(method, server.url + path, json=body, headers=CLIENTS)
    (seen,) = (one for one in predictor.seen[before:] if one.get("path") == path or one["method"] == "GRPC")
    return credentials_of(seen)


def infer_by_grpc(server: Served, metadata: list[tuple[str, str]]) -> None:
    message = pb.ModelInferRequest(model_name="m")
    tensor = message.inputs.add(name="prompt", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"hi")
    with grpc.insecure_channel(server.grpc_url) as channel:
        pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, metadata=metadata, timeout=20)


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_by_default_no_credential_goes_on(
    transformer: Served, predictor: FakePredictor, method: str, path: str, body: Any
) -> None:
    assert asked(transformer, predictor, method, path, body) == {}


def test_where_nobody_is_asked_nobody_is_counted(transformer: Served) -> None:
    assert "aim_identity" not in HTTP.get(transformer.url + "/metrics").text


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_forwarded_as_it_came(forwarding: Served, predictor: FakePredictor, method: str, path: str, body: Any) -> None:
    assert asked(forwarding, predictor, method, path, body) == CLIENTS


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_the_transformers_own_in_the_clients_place(
    with_own_key: Served, predictor: FakePredictor, method: str, path: str, body: Any
) -> None:
    assert asked(with_own_key, predictor, method, path, body) == {"authorization": f"Bearer {OWN}"}


def test_over_grpc(
    transformer: Served, forwarding: Served, with_own_key: Served, to_grpc_only: Served, predictor: FakePredictor
) -> None:
    own = {"authorization": f"Bearer {OWN}"}
    for server, expected in ((transformer, {}), (forwarding, CLIENTS), (with_own_key, own), (to_grpc_only, {})):
        infer_by_grpc(server, list(CLIENTS.items()))
        assert credentials_of(predictor.last) == expected
    assert asked(to_grpc_only, predictor, "POST", "/v2/models/m/infer", V2) == {}


def test_the_transformers_own_questions_carry_its_own_key(with_own_key: Served, predictor: FakePredictor) -> None:
    def was_asked() -> bool:
        HTTP.get(f"{with_own_key.url}/v2/models/m/ready")
        asked = [seen for seen in predictor.seen if seen.get("path") == "/v1/models/m"]
        return bool(asked) and credentials_of(asked[-1]) == {"authorization": f"Bearer {OWN}"}

    assert eventually(was_asked)


def test_a_header_that_grpc_cannot_carry_ends_no_request(to_grpc_only: Served, predictor: FakePredictor) -> None:
    answer = HTTP.post(f"{to_grpc_only.url}/v2/models/m/infer", json=V2, headers={"x-odd": "é".encode("latin-1")})
    assert answer.status_code == 200
    assert "x-odd" not in dict(predictor.last["headers"])


def test_a_new_key_is_taken_up_and_a_broken_file_changes_nothing(
    with_own_key: Served, predictor: FakePredictor, key_file: Path
) -> None:
    def sends(key: str) -> bool:
        return asked(with_own_key, predictor, *ROUTES[0]) == {"authorization": f"Bearer {key}"}

    def put(text: str) -> None:
        key_file.with_suffix(".new").write_text(text)
        os.replace(key_file.with_suffix(".new"), key_file)

    put("own-secret-2\n")
    assert eventually(lambda: sends("own-secret-2"))
    put("own-secret-3 and more")
    assert eventually(lambda: sends("own-secret-2") and "does not hold one key" in with_own_key.stderr())
    assert sends("own-secret-2")
    key_file.unlink()
    assert eventually(lambda: sends("own-secret-2") and "cannot be read" in with_own_key.stderr())
    put(OWN)
    assert eventually(lambda: sends(OWN))
    told = with_own_key.stderr() + str(with_own_key.access_lines())
    assert "secret" not in told


@pytest.mark.parametrize("status", [200, 401])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])  # checked, and as it comes
@pytest.mark.parametrize("chunks", [None, 1, 5])
def test_a_predictor_that_repeats_our_key_tells_it_no_client(
    with_own_key: Served, status: int, path: str, chunks: int | None
) -> None:
    body = f'{{"error": "no such key: {OWN}", "{OWN}": "own{OWN}"}}'
    told = {"content-type": "application/json", "www-authenticate": f"Bearer {OWN}", "x-given": OWN}
    headers = orders(status=status, body=body, headers=told, chunks=chunks)
    answer = HTTP.post(with_own_key.url + path, json=ask("hi"), headers=headers)
    assert answer.status_code == status
    hidden = "*" * len(OWN)
    assert answer.text == body.replace(OWN, hidden) or answer.json() == orjson.loads(body.replace(OWN, hidden))
    assert (answer.headers["x-given"], answer.headers["www-authenticate"]) == (hidden, f"Bearer {hidden}")


def test_nor_over_grpc(with_own_key: Served) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        infer_by_grpc(with_own_key, list(orders(code="UNAUTHENTICATED", message=f"no such key: {OWN}").items()))
    assert refused.value.details() == f"no such key: {'*' * len(OWN)}"


# --- the parts ------------------------------------------------------------------------------------------------------

TOKEN = st.text("abcdefghijklmnopqrstuvwxyz-_", min_size=1, max_size=20).map(str.encode)


@given(st.lists(st.tuples(TOKEN, TOKEN)))
def test_stripping_takes_credentials_only_and_keeps_the_order(headers: list[tuple[bytes, bytes]]) -> None:
    secret = [(name, b"x") for name in (b"authorization", b"x_api_key", b"api-key", b"proxy-authorization")]
    kept = [item for item in headers if item[0] not in dict(secret)]
    assert Credentials().sent([*secret, *headers, *secret]) == kept
    assert Credentials("forward").sent([*secret, *headers]) == [*secret, *headers]


def test_a_client_without_a_credential_gets_not_ours(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(OWN)
    own = KeyFile(tmp_path / "key", "--key")
    assert Credentials("forward", own).sent([(b"a", b"b")]) == [(b"a", b"b")]
    ours = [(b"authorization", f"Bearer {OWN}".encode())]
    assert Credentials("forward", own).own() == Credentials("strip", own).own() == ours
    assert Credentials("strip", own).sent(ours) == ours  # once


@given(
    st.lists(st.binary(max_size=8).map(lambda raw: bytes(b"ab "[byte % 3] for byte in raw))),
    st.sampled_from([b"a", b"ab", b"aab", b"abab"]),
)
def test_what_is_hidden_is_so_however_it_is_cut(pieces: list[bytes], key: bytes) -> None:
    hiding = Hidden(key)
    shown = [*map(hiding.more, pieces), hiding.rest()]
    assert b"".join(shown) == b"".join(pieces).replace(key, b"*" * len(key))
    for number in range(len(pieces)):  # no more is held back than may become one
        assert len(b"".join(shown[: number + 1])) > len(b"".join(pieces[: number + 1])) - len(key)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "key"
    file.write_text(OWN)
    own = KeyFile(file, "--key")
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    own.look()
    assert own.key == OWN.encode()
    with pytest.raises(ValueError, match="give a readable file"):
        read_key(file)


def test_a_file_is_read_anew_when_it_is_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "key"
    file.write_text("first-secret")
    own = KeyFile(file, "--key").follow()
    with caplog.at_level(logging.INFO):
        file.write_text("second-secret")
        eventually(lambda: own.key == b"second-secret")
        own.close()
        file.write_text("")
        own.look()
        assert own.key == b"second-secret"
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "secret" not in caplog.text.replace(str(tmp_path), "")


@pytest.mark.parametrize("content", [b"", b" \n", b"a b", b"a\nb", "ä".encode(), b"a" * 20_000, b"a\0"])
def test_a_file_that_holds_no_key_ends_the_start(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="does not hold one key"):
        read_key(file)
    with pytest.raises(SettingsError, match=r"predictor_api_key_file.*does not hold one key"):
        settings("--predictor_api_key_file", str(file))


def test_settings_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        settings("--predictor_api_key_file", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="predictor_credentials"):
        settings("--predictor_credentials", "keep")
    assert settings().predictor_credentials == "strip"


def settings(*flags: str) -> GuardrailSettings:
    argv = ["--predictor_host", "x", *flags]
    return GuardrailSettings.load(argv, {}, prog="aim-guardrail", description="")
