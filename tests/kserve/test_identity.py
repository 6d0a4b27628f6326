"""Who asks, over every protocol of both processes: with real clients, to real servers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import orjson
import pytest

from aim_kserve.errors import StartupError
from aim_kserve.identity import keys as key_file
from aim_kserve.identity.key_source import KeySource
from aim_kserve.kserve import pb, pb_grpc
from guarded import eventually
from issuer import Issuer
from served import Served

NOW = datetime.now(UTC)
TRITON = Path(__file__).parent.parent / "fakes" / "triton_grpc_client.py"
DAY = timedelta(days=1)
HTTP = httpx.Client()  # one for all: each loads what it trusts
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture(scope="module", autouse=True)
def _closing() -> Iterator[None]:
    yield
    HTTP.close()


def made(file: Path) -> dict[str, str]:
    """A key file of one key of each kind; their texts by id."""
    kinds: dict[str, dict[str, Any]] = {
        "caller": {"scopes": ["infer"], "qos_class": "high"},
        "operator": {"scopes": ["admin"]},
        "scraper": {"scopes": ["metrics"]},
        "old": {"scopes": ["infer"], "expires": NOW - DAY},
        "early": {"scopes": ["infer"], "not_before": NOW + DAY},
    }
    made = {name: key_file.new_key(name, tenant=f"of-{name}", **kind) for name, kind in kinds.items()}
    key_file.write(file, key_file.KeyFile(keys=tuple(entry for _, entry in made.values())))
    return {name: text for name, (text, _) in made.items()}


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


class Closed:
    """A server that asks who, what opens it, and what tokens come from."""

    def __init__(self, server: Served, keys: dict[str, str], issuer: Issuer, file: Path) -> None:
        self.server, self.keys, self.issuer, self.file = server, keys, issuer, file

    def chat(self, headers: dict[str, str], path: str = "/v1/chat/completions") -> httpx.Response:
        return HTTP.post(self.server.url + path, json=CHAT, headers=headers)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    file = tmp_path_factory.mktemp("identity") / "keys.yaml"
    keys = made(file)
    with (
        Issuer("ES256", "RS256", "EdDSA") as issuer,
        Served.fake("--api_keys", str(file), "--cors_origins", "https://page.example", *issuer.flags()) as server,
    ):
        yield Closed(server, keys, issuer, file)


@pytest.mark.parametrize("path", ["/", "/health", "/healthz", "/readyz", "/v2/health/live", "/v2/models/m/ready"])
def test_health_needs_nothing(closed: Closed, path: str) -> None:
    assert HTTP.get(closed.server.url + path).status_code == 200


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        ("caller", 200, None),
        ("operator", 403, "insufficient_scope"),
        ("scraper", 403, "insufficient_scope"),
        ("old", 401, "expired_api_key"),
        ("early", 401, "early_api_key"),
        ("wrong", 401, "invalid_api_key"),
        ("unknown", 401, "invalid_api_key"),
        ("of another kind", 401, "malformed_token"),
    ],
)
def test_a_key_opens_what_it_is_for(closed: Closed, key: str, status: int, code: str | None) -> None:
    others = {"wrong": closed.keys["caller"][:-1] + "x", "unknown": "aim_nobody_0f", "of another kind": "sk-123"}
    text = closed.keys.get(key) or others[key]
    for headers in (bearer(text), {"x-api-key": text}, {"api-key": text}, {"authorization": f"bearer  {text}"}):
        answer = closed.chat(headers)
        assert answer.status_code == status
        if code is not None:
            error = answer.json()["error"]
            assert error["code"] == code
            assert set(error) == {"message", "type", "param", "code"}
            assert answer.headers["www-authenticate"].startswith('Bearer realm="aim", error="')
            assert text not in answer.text


def test_one_credential_and_in_its_form(closed: Closed) -> None:
    key = closed.keys["caller"]
    assert closed.chat({}).json()["error"]["code"] == "missing_credential"
    assert closed.chat({}).headers["www-authenticate"] == 'Bearer realm="aim"'
    assert closed.chat({"authorization": "Bearer", "x-api-key": ""}).json()["error"]["code"] == "missing_credential"
    assert closed.chat({**bearer(key), "x-api-key": key}).status_code == 200
    assert closed.chat({**bearer(key), "x-api-key": closed.keys["operator"]}).json()["error"]["code"] == (
        "two_credentials"
    )
    assert closed.chat({"authorization": f"Basic {key}"}).json()["error"]["code"] == "malformed_credential"
    assert closed.chat({"x-api-key": "a" * 8193}).json()["error"]["code"] == "malformed_credential"
    large = HTTP.post(closed.server.url + "/v1/chat/completions", content=b" " * 3_000_000, headers=bearer("aim_no_1"))
    assert large.status_code == 401


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({}, None),
        ({"aud": ["other", "aim"]}, None),
        ({"exp": -5}, None),  # seconds from now; within the leeway
        ({"exp": -60}, "expired_token"),
        ({"nbf": 600}, "early_token"),
        ({"aud": "other"}, "wrong_audience"),
        ({"aud": None}, "wrong_claims"),
        ({"exp": None}, "wrong_claims"),
        ({"iss": "https://other.example"}, "wrong_issuer"),
        ({"sub": None}, "wrong_claims"),
        ({"scope": "openid admin"}, "insufficient_scope"),
    ],
)
@pytest.mark.parametrize("kid", ["es256", "rs256", "eddsa"])
def test_a_token_counts_as_the_settings_pin_it(closed: Closed, kid: str, claims: dict[str, Any], code: str) -> None:
    times = {name: int(time.time()) + claims[name] for name in ("exp", "nbf") if claims.get(name) is not None}
    token = closed.issuer.token(kid, **claims | times)
    answer = closed.chat(bearer(token))
    assert answer.json().get("error", {}).get("code") == code
    assert answer.status_code == (200 if code is None else 403 if code == "insufficient_scope" else 401)
    assert token not in answer.text


def test_errors_are_in_the_protocols_own_shape(closed: Closed) -> None:
    for path in ("/v1/models/m:predict", "/v2/models/m/infer", "/v2/models", "/metrics", "/no/such/route"):
        answer = HTTP.post(closed.server.url + path, json={})
        assert answer.status_code == 401
        assert isinstance(answer.json()["error"], str)
    assert isinstance(HTTP.get(closed.server.url + "/openai/v1/models").json()["error"], dict)


@pytest.mark.parametrize(
    ("method", "path", "key"),
    [
        ("GET", "/metrics", "scraper"),
        ("GET", "/v1/models", "caller"),
        ("GET", "/v1/models/m", "caller"),
        ("GET", "/v2/models/m", "caller"),
        ("POST", "/v2/repository/index", "operator"),
        ("POST", "/v2/repository/models/m/load", "operator"),
    ],
)
def test_a_scope_is_for_its_routes_only(closed: Closed, method: str, path: str, key: str) -> None:
    for name in ("caller", "operator", "scraper"):
        answer = HTTP.request(method, closed.server.url + path, headers=bearer(closed.keys[name]))
        assert answer.status_code == (200 if name == key else 403)
    assert HTTP.request(method, closed.server.url + path).status_code == 401
    assert HTTP.request("HEAD", closed.server.url + path).status_code == 401


def test_a_browser_asks_first_without_a_credential_and_may_read_the_refusal(closed: Closed) -> None:
    origin = {"origin": "https://page.example"}
    asks = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert HTTP.options(closed.server.url + "/v1/chat/completions", headers=asks).status_code == 200
    assert closed.chat(origin).headers["access-control-allow-origin"] == "https://page.example"
    assert HTTP.options(closed.server.url + "/v1/chat/completions", headers=origin).status_code == 401


def test_openais_client_knows_the_refusals(closed: Closed) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=closed.server.url + "/v1", api_key=key, max_retries=0)

    answer = client(closed.keys["caller"]).chat.completions.create(**CHAT)  # type: ignore[arg-type]
    assert answer.choices
    with pytest.raises(openai.AuthenticationError, match="not known here"):
        client("aim_nobody_0f").models.list()
    with pytest.raises(openai.PermissionDeniedError, match="lacks the scope infer"):
        client(closed.keys["scraper"]).models.list()


def test_grpc_asks_by_the_same_table(closed: Closed) -> None:
    with grpc.insecure_channel(closed.server.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ModelReady(pb.ModelReadyRequest(name="m")).ready
        metadata, load = stub.ModelMetadata, stub.RepositoryModelLoad
        asks = pb.ModelMetadataRequest(name="m")
        assert metadata(asks, metadata=[("authorization", f"Bearer {closed.keys['caller']}")]).name == "m"
        assert metadata(asks, metadata=[("x-api-key", closed.issuer.token())]).name == "m"
        loads = pb.RepositoryModelLoadRequest(model_name="m")
        assert load(loads, metadata=[("x-api-key", closed.keys["operator"])]).isLoaded
        for call, request, given, code in (
            (metadata, asks, [], "UNAUTHENTICATED"),
            (metadata, asks, [("x-api-key", "aim_nobody_0f")], "UNAUTHENTICATED"),
            (metadata, asks, [("x-api-key", closed.keys["old"])], "UNAUTHENTICATED"),
            (metadata, asks, [("x-api-key", closed.keys["operator"])], "PERMISSION_DENIED"),
            (load, loads, [("x-api-key", closed.keys["caller"])], "PERMISSION_DENIED"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call(request, metadata=given)
            assert refused.value.code().name == code
        for name, code in (("caller", "PERMISSION_DENIED"), ("operator", "UNIMPLEMENTED"), ("", "UNAUTHENTICATED")):
            unknown = channel.unary_unary("/inference.GRPCInferenceService/ModelStreamInfer")
            with pytest.raises(grpc.RpcError) as refused:
                unknown(b"", metadata=[("x-api-key", closed.keys[name])] if name else [])
            assert refused.value.code().name == code


def test_grpc_reads_nothing_of_who_may_not_ask(closed: Closed) -> None:
    with grpc.insecure_channel(closed.server.grpc_url) as channel:
        caller = [("x-api-key", closed.keys["caller"])]
        for method, given, code in (
            ("ModelInfer", [], "UNAUTHENTICATED"),
            ("ModelInfer", caller, "INVALID_ARGUMENT"),
            ("ServerLive", [], "INVALID_ARGUMENT"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"\xff" * 50, metadata=given)
            assert refused.value.code().name == code
    assert "Traceback" not in closed.server.stderr()


def test_tritons_client_knows_the_refusals(closed: Closed) -> None:
    def infer(key: str) -> dict[str, Any]:
        return {"infer": {"prompts": ["hello"], "headers": bearer(key)}}

    calls = [infer(closed.keys["caller"]), infer(closed.keys["scraper"]), infer("aim_nobody_0f")]
    calls += [{"ask": "is_model_ready", "arguments": ["m"]}, {"ask": "get_server_metadata", "arguments": []}]
    client = subprocess.run(
        [sys.executable, str(TRITON), closed.server.grpc_url],
        input=b"\n".join(map(orjson.dumps, calls)),
        stdout=subprocess.PIPE,
        check=True,
    )
    right, scraper, nobody, ready, metadata = map(orjson.loads, client.stdout.splitlines())
    assert right["text"]
    assert scraper["status"] == "StatusCode.PERMISSION_DENIED"
    assert nobody["status"] == "StatusCode.UNAUTHENTICATED"
    assert ready is True
    assert metadata["status"] == "StatusCode.UNAUTHENTICATED"


def test_logs_and_metrics_name_the_credential_and_never_hold_it(closed: Closed) -> None:
    token = closed.issuer.token(sub="bob")
    closed.chat(bearer(closed.keys["caller"]))
    closed.chat(bearer(closed.keys["old"]))
    closed.chat(bearer(token))
    expected = {("caller", "of-caller", 200), ("old", None, 401), ("jwt:bob", "bob", 200)}

    def logged() -> set[tuple[Any, ...]]:
        return {(line.get("key"), line.get("tenant"), line["status"]) for line in closed.server.access_lines()}

    assert eventually(lambda: logged() >= expected)
    scraped = HTTP.get(closed.server.url + "/metrics", headers=bearer(closed.keys["scraper"])).text
    assert 'aim_identity_requests_total{credential="caller",outcome="admitted"}' in scraped
    assert 'aim_identity_requests_total{credential="old",outcome="expired_api_key"}' in scraped
    assert 'aim_identity_requests_total{credential="jwt",outcome="admitted"}' in scraped
    assert 'aim_identity_source_ok{source="api_keys"} 1.0' in scraped
    assert 'aim_identity_source_ok{source="jwks"} 1.0' in scraped
    assert 'credential="nobody"' not in scraped
    written = scraped + closed.server.stderr() + str(closed.server.access_lines())
    for secret in (*(text.rpartition("_")[2] for text in closed.keys.values()), token.rpartition(".")[2]):
        assert secret not in written


def test_keys_are_read_again_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    """As a Kubernetes Secret changes: ``keys.yaml`` → ``..data/keys.yaml``, and ``..data`` → another folder."""
    one, two = tmp_path / "..one", tmp_path / "..two"
    for folder in (one, two):
        folder.mkdir()
    first, second = made(one / "keys.yaml"), made(two / "keys.yaml")
    (tmp_path / "..data").symlink_to(one.name)
    file = tmp_path / "keys.yaml"
    file.symlink_to("..data/keys.yaml")

    with Served.fake("--api_keys", str(file)) as server:

        def status(key: str) -> int:
            return HTTP.get(server.url + "/v1/models", headers=bearer(key)).status_code

        def swap(to: Path) -> None:
            (tmp_path / "..new").symlink_to(to.name)
            (tmp_path / "..new").rename(tmp_path / "..data")

        assert (status(first["caller"]), status(second["caller"])) == (200, 401)
        swap(two)
        assert eventually(lambda: status(second["caller"]) == 200)
        assert status(first["caller"]) == 401
        (two / "keys.yaml").write_text("version: 1\nkeys: [")

        def is_ok() -> bool:
            return 'source="api_keys"} 1.0' in HTTP.get(server.url + "/metrics", headers=bearer(second["scraper"])).text

        assert eventually(lambda: not is_ok())
        assert status(second["caller"]) == 200
        assert f"{file}:3: not valid YAML" in server.stderr()
        swap(one)
        assert eventually(lambda: status(first["caller"]) == 200)
        key_file.revoke(file, "caller")
        assert eventually(lambda: status(first["caller"]) == 401)
        assert HTTP.get(server.url + "/v2/health/ready").status_code == 200


def test_a_start_that_would_let_nobody_in_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("version: 1\nkeys: [{id: a}]")
    with Served.fake("--api_keys", str(file), wait=False) as server:
        assert server.exit_code() == 1
        assert f"error: {file}:2: keys[0] ('a'): hash: missing" in server.stderr()
        assert "Traceback" not in server.stderr()
    file.write_text("version: 1\nkeys: []")
    with pytest.raises(StartupError, match=r"keys: has none, so that nobody is let in: add one"):
        KeySource(file)
    key_file.add(file, key_file.new_key("old", tenant="t", expires=NOW - DAY)[1])
    with pytest.raises(StartupError, match=r"every one has expired, 'old' as the last on"):
        KeySource(file)


def test_a_file_that_everybody_may_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path / "keys.yaml")
    for mode, told in ((0o640, ""), (0o644, "everybody on this machine may read it: chmod o= it")):
        (tmp_path / "keys.yaml").chmod(mode)
        KeySource(tmp_path / "keys.yaml")
        assert told in caplog.text
        assert bool(caplog.text) == bool(told)
