"""No key and no token is told, wherever somebody puts one: in logs, the audit log, metrics, errors and traces."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import orjson
import pytest

from aim_kserve.kserve import pb, pb_grpc
from closed_pair import SCOPES, ClosedPair, bearer
from guarded import eventually
from served import Served

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def hostile(pair: ClosedPair, secret: str) -> Iterator[tuple[str, str, dict[str, str], bytes | None]]:
    """Requests with ``secret`` where it does not belong, each by somebody who may ask and by the secret itself."""
    everything = pair.credentials.texts["infer"]
    admin = pair.credentials.texts["admin"]
    quoted = secret.replace("_", "%5F")
    for own in (everything, admin, secret):
        headers = bearer(own)
        for path in (f"/{secret}", f"/v1/{secret}", f"/v1/models/{secret}", f"/v2/models/{secret}/infer", f"/{quoted}"):
            yield "GET", path, headers, None
            yield "POST", path, headers, b"{}"
        yield "GET", f"/v1/models?api_key={secret}&key={secret}", headers, None
        yield "POST", "/v1/chat/completions", headers, orjson.dumps({**CHAT, "model": secret})
        yield "POST", "/v1/chat/completions", headers, orjson.dumps({**CHAT, secret: secret, "temperature": secret})
        yield "POST", "/v1/completions", headers, orjson.dumps({"model": "m", "prompt": secret, "max_tokens": "x"})
        yield "POST", "/v1/models/m:predict", headers, orjson.dumps({"instances": [1], secret: 1})
        yield "POST", f"/v2/repository/models/{secret}/load", headers, b"{}"
        yield "POST", f"/v2/repository/models/{secret}/migrate", headers, b'{"card": 0}'
        adapter = {"lora_name": secret, "lora_path": f"/{secret}", "base_model_name": "m"}
        yield "POST", "/v1/load_lora_adapter", headers, orjson.dumps(adapter)
        yield "POST", "/v1/unload_lora_adapter", headers, orjson.dumps({"lora_name": secret})
        yield "POST", "/v1/chat/completions", {**headers, "content-type": secret}, orjson.dumps(CHAT)
        for name in ("x-request-id", "user-agent", "x-user-id", "referer", "cookie", "x-forwarded-for", "host"):
            yield "POST", "/v1/chat/completions", {**headers, name: secret}, orjson.dumps(CHAT)
        traced = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": f"vendor={secret}"}
        yield "POST", "/v1/chat/completions", {**headers, **traced}, orjson.dumps(CHAT)
    for odd in (f"Basic {secret}", f"Bearer {secret} {secret}", f"bearer  {secret}é", secret, f"Bearer {secret * 150}"):
        yield "POST", "/v1/chat/completions", {"authorization": odd}, orjson.dumps(CHAT)
        yield "GET", "/v2/models/m", {"x-api-key": odd, "authorization": f"Bearer {secret}"}, None
    yield "GET", "/v1/models", {"api-key": f"{secret}\x01"}, None
    yield "GET", "/v1/models", {secret: secret}, None
    yield "GET", "/v1/models", {"x-api-key": secret * 2000}, None  # more than any server reads


def send(server: Served, method: str, path: str, headers: dict[str, str], body: bytes | None) -> tuple[int, bytes]:
    """As written: libraries would refuse to send some of it. Status 0: the connection was closed instead."""
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="host" in headers, skip_accept_encoding=True)
        for name, value in {**headers, "content-length": str(len(body or b""))}.items():
            connection.putheader(name, value.encode("utf-8"))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def by_grpc(server: Served, secret: str, own: str) -> list[str]:
    """What the errors say."""
    said = []
    metadata = [*bearer(own).items(), ("x-request-id", secret), ("x-other", secret)]
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for call, request in (
            (stub.ModelInfer, pb.ModelInferRequest(model_name=secret, id="1")),
            (stub.ModelMetadata, pb.ModelMetadataRequest(name=secret)),
            (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name=secret)),
            (channel.unary_unary(f"/{secret}/{secret}"), b""),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=metadata, timeout=30)
            said.append(str(caught.value.details()))
    return said


def parts_of(secret: str) -> list[str]:
    """What of it must be nowhere: of a token its claims and its signature, of a key its secret half."""
    return secret.split(".")[1:] if "." in secret else [secret.rpartition("_")[2]]


def told(pair: ClosedPair, name: str) -> dict[str, str]:
    server = pair.servers[name]
    metrics = httpx.get(f"{server.url}/metrics", headers=bearer(pair.credentials.texts["metrics"]), timeout=30).text
    lines = [orjson.dumps(line).decode() for line in (*server.access_lines(), *server.audit_lines())]
    return {"stdout": "\n".join(lines), "stderr": server.stderr(), "metrics": metrics}


@pytest.mark.parametrize("kind", ["right key", "revoked key", "right token", "expired key"])
def test_a_secret_in_the_wrong_place_is_told_nowhere(pair: ClosedPair, kind: str) -> None:
    texts = pair.credentials.texts
    right: Any = {
        "right key": texts["no-filter"],
        "revoked key": texts["wrong"],
        "right token": pair.issuer.token(sub="eve", scope=" ".join(SCOPES)),
        "expired key": texts["expired"],
    }
    secret = right[kind]
    asked = 0
    for name, server in pair.servers.items():
        for method, path, headers, body in hostile(pair, secret):
            status, answer = send(server, method, path, headers, body)
            asked += 1
            assert status != 500, (name, method, path, answer)
            for part in parts_of(secret):
                assert status == 200 or part.encode() not in answer, (name, method, path, status)
        for own in (texts["infer"], texts["admin"], secret):
            for said in by_grpc(server, secret, own):
                assert not [part for part in parts_of(secret) if part in said]
    assert eventually(lambda: len(pair.traces.spans) > 5)
    for name in pair.servers:
        for where, text in {**told(pair, name), "traces": str(pair.traces.spans)}.items():
            for part in parts_of(secret):
                assert part not in text, (name, where, text[max(0, text.index(part) - 200) :][:400])
    assert asked > 150


def test_what_was_asked_did_reach_the_logs(pair: ClosedPair) -> None:
    """Else the test above would find nothing for want of anything to look at."""
    secret = pair.credentials.texts["no-filter"]
    for server in pair.servers.values():
        send(server, "GET", f"/v1/models/{secret}", bearer(pair.credentials.texts["infer"]), None)
        paths = [line["path"] for line in server.access_lines()]
        assert "/v1/models/aim_no-filter_***" in paths
    send(pair.servers["runtime"], "POST", f"/v2/repository/models/{secret}/load", bearer(secret), b"{}")
    assert {line["credential"] for line in pair.servers["runtime"].audit_lines()} >= {None}
