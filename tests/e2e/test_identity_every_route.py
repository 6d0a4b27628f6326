"""Identity on every route of both processes, none forgotten; what each answers to whom is docs/identity-routes.md.

The routes are asked of the real apps (``route_list.py``) and of the gRPC service's descriptor; the answers of real
servers, the transformer before the runtime. ``WRITE_PAGES=1`` writes the page anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import orjson
import pytest

import route_list
from aim_kserve.identity.routes import OPEN, TABLE, needed, needed_by_grpc
from aim_kserve.kserve import pb, pb_grpc
from closed_pair import CASES, SCOPES, ClosedPair, bearer
from served import Served

PAGE = Path(__file__).parents[2] / "docs/identity-routes.md"
SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
OPEN_ROUTES = {
    *("/", "/health", "/healthz", "/ping", "/readyz", "/readyz/NAME", "/v2/health/live", "/v2/health/ready"),
    *("/v2/models/NAME/ready", "/v2/models/NAME/versions/VERSION/ready", "ServerLive", "ServerReady", "ModelReady"),
}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
TENSOR = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["hi"]}
#: What a POST needs to be a request at all.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", **CHAT},
    "/v1/completions": {"model": "m", "prompt": "hi", "max_tokens": 1},
    "/v1/tokenize": {"model": "m", "prompt": "hi"},
    "/tokenize": {"model": "m", "prompt": "hi"},
    "/v1/models/NAME:predict": {"instances": ["hi"]},
    "/v2/models/NAME/infer": {"inputs": [TENSOR]},
    "/v2/models/NAME/versions/VERSION/infer": {"inputs": [TENSOR]},
    "/feedback": {"request_id": "nobody's", "label": "false_positive"},
    **{key: {"text": "hi"} for key in ["/filter", "/v1/filter"]},
    **{key: {"items": [{"text": "hi"}]} for key in ["/filter/batch", "/v1/filter/batch"]},
    "/v2/repository/models/NAME/migrate": {"card": 9},
}


@dataclass(frozen=True)
class Asked:
    """One route as it is asked; ``shown`` on the page."""

    method: str
    path: str
    shown: str


@pytest.fixture(scope="module")
def routes() -> list[Asked]:
    """Of both apps."""
    found: dict[Asked, None] = {}
    for process, flags in {"runtime": ["--runtime_adapters", "true"], "guardrail": ["--predictor_host", "x"]}.items():
        command = [sys.executable, route_list.__file__, process, *flags]
        told = subprocess.run(command, capture_output=True, check=True).stdout
        for line in told.splitlines():
            route = orjson.loads(line)
            for method in route["methods"]:
                found[_asked(method, route["path"])] = None
    return list(found)


def _asked(method: str, template: str) -> Asked:
    def filled(names: dict[str, str]) -> str:
        return re.sub(r"\{(\w+?)(?::path)?\}", lambda found: names[found[1]], template)

    name = "c" if "/repository/" in template else "m"  # one that is loaded and unloaded, and one that stays
    shown = filled({"name": "NAME", "model_name": "NAME", "model_version": "VERSION"})
    return Asked(method, filled({"name": name, "model_name": name, "model_version": "1"}), shown)


def test_every_route_of_both_apps_has_an_entry_in_the_table(routes: list[Asked]) -> None:
    """A route that somebody adds is closed by default; to open it to those whose it is takes a line in the table."""
    assert len(routes) > 60
    assert {"/v1/chat/completions", "/v2/repository/models/c/migrate", "/v1/load_lora_adapter", "/metrics"} <= {
        route.path for route in routes
    }

    def listed(route: Asked) -> bool:
        known = any(pattern.fullmatch(route.path) for pattern, _ in TABLE)
        return known or needed(route.method, route.path) == OPEN or route.path in OPEN_ROUTES

    assert [route for route in routes if not listed(route)] == []


def test_what_every_route_answers_to_whom(routes: list[Asked], pair: ClosedPair) -> None:
    with httpx.Client(timeout=30) as client:
        rows = {f"{route.method} {route.shown}": _asked_of_all(client, route, pair) for route in routes}
    for method in SERVICE.methods:
        rows[f"gRPC {method.name}"] = _called_on_all(method.name, pair)
    for name, row in rows.items():
        needs, *statuses = row
        for process in range(len(pair.servers)):
            codes = [status.split("/")[process] for status in statuses]
            if needs == "nothing":
                assert name.split()[1] in OPEN_ROUTES
                assert len(set(codes)) == 1, name
            else:
                assert codes[:5] in (["401"] * 4 + ["403"], ["UNAUTHENTICATED"] * 4 + ["PERMISSION_DENIED"]), name
            assert codes[5] not in ("401", "403", "500", "INTERNAL", "UNAUTHENTICATED", "PERMISSION_DENIED"), name
    page = _page(rows)
    if os.environ.get("WRITE_PAGES"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "WRITE_PAGES=1 pytest tests/e2e/test_identity_every_route.py writes it anew"


def _asked_of_all(client: httpx.Client, route: Asked, pair: ClosedPair) -> list[str]:
    scopes = needed(route.method, route.path)
    statuses = []
    for case in CASES:
        headers, told = pair.credentials.of(case, scopes), []
        for server in pair.servers.values():
            body = BODIES.get(route.shown.removeprefix("/openai"), {}) if route.method == "POST" else None
            answer = client.request(route.method, server.url + route.path, json=body, headers=headers)
            told.append(str(answer.status_code))
            if answer.status_code in (401, 403):
                _check_shape(route, answer)
        statuses.append("/".join(told))
    return ["nothing" if scopes == OPEN else ", ".join(sorted(scopes)), *statuses]


def _check_shape(route: Asked, answer: httpx.Response) -> None:
    assert answer.headers["www-authenticate"].startswith("Bearer")
    if route.method == "HEAD":
        return
    error = answer.json()["error"]
    openai = route.path.startswith(("/v1/", "/openai/")) and not route.path.endswith((":predict", ":explain"))
    assert isinstance(error, dict if openai else str), route
    if openai:
        assert set(error) == {"message", "type", "param", "code"}


def _called_on_all(name: str, pair: ClosedPair) -> list[str]:
    scopes = needed_by_grpc(f"/{SERVICE.full_name}/{name}")
    statuses = []
    for case in CASES:
        metadata = list(pair.credentials.of(case, scopes).items())
        statuses.append("/".join(_called(server, name, metadata) for server in pair.servers.values()))
    return ["nothing" if scopes == OPEN else ", ".join(sorted(scopes)), *statuses]


def _called(server: Served, name: str, metadata: list[tuple[str, str]]) -> str:
    request = getattr(pb, SERVICE.methods_by_name[name].input_type.name)()
    for field in ("name", "model_name"):
        if field in request.DESCRIPTOR.fields_by_name:
            setattr(request, field, "c" if name.startswith("Repository") else "m")
    if name == "ModelInfer":
        tensor = request.inputs.add(name="prompt", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(b"hi")
    answers = getattr(pb, SERVICE.methods_by_name[name].output_type.name)
    with grpc.insecure_channel(server.grpc_url) as channel:
        call = channel.unary_unary(f"/{SERVICE.full_name}/{name}", type(request).SerializeToString, answers.FromString)
        try:
            call(request, metadata=metadata, timeout=30)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def _page(rows: dict[str, list[str]]) -> str:
    """``/openai/v1/…`` stands with ``/v1/…``, HEAD with GET: they share a row."""
    shown: dict[str, list[str]] = {}
    for name, row in rows.items():
        plain = name.replace(" /openai/", " /").replace("HEAD ", "GET ")
        assert shown.setdefault(plain, row) == row, f"{name} is answered otherwise than {plain}"
    head = ["route", "needs", *CASES]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, (needs, *statuses) in shown.items():
        once = [status.split("/")[0] if len(set(status.split("/"))) == 1 else status for status in statuses]
        lines.append(f"| `{name}` | {' | '.join([needs, *once])} |")
    return _HEAD + "\n".join(lines) + "\n"


_HEAD = """\
# What every route answers to whom

Asked of real servers, route by route, by `tests/e2e/test_identity_every_route.py`, which fails for a route that is
missing here ([who may ask](identity.md)). `/openai/v1/…` is answered as `/v1/…`, HEAD as GET. *wrong scope*: a key with
all scopes but the one that is needed; *right*: a key with that one only, and the smallest request, of a runtime whose
engines have chat, completions and tokenize. Two statuses are the runtime's and the transformer's before it, which hands
the credential on.

"""


UNKNOWN = ("/flush_cache", "/v1", "/v2/nothing", "/admin", "/%2e%2e/metrics", "//v1/models", "/v1/models/../../metrics")


@pytest.mark.parametrize("path", UNKNOWN)
def test_what_nobody_has_thought_of_is_closed(pair: ClosedPair, path: str) -> None:
    for server in pair.servers.values():
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
            assert _raw(server, method, path, {}) == 401, (method, path)
            statuses = {
                _raw(server, method, path, pair.credentials.of("right", frozenset([scope]))) for scope in SCOPES
            }
            assert 403 in statuses, (method, path)  # no one scope has all
            assert 500 not in statuses


def _raw(server: Served, method: str, path: str, headers: dict[str, str]) -> int:
    """The path as it is written: httpx would take ``..`` out of it."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in {**headers, "content-length": "0"}.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_transformer_asks_a_closed_runtime_with_its_own_key(pair: ClosedPair) -> None:
    """It is ready (it was waited for), and tells the tensors."""
    server, metadata = pair.servers["transformer"], list(pair.credentials.of("right", frozenset(["infer"])).items())
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        told = stub.ModelMetadata(pb.ModelMetadataRequest(name="m"), metadata=metadata, timeout=30)
    assert [tensor.name for tensor in told.inputs] == ["prompt"]


def test_a_grpc_service_or_method_of_no_table_is_closed(pair: ClosedPair) -> None:
    methods = [f"/{SERVICE.full_name}/ModelStreamInfer", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"]
    for server in pair.servers.values():
        with grpc.insecure_channel(server.grpc_url) as channel:
            for method in methods:
                codes = []
                for given in ({}, pair.credentials.of("right", frozenset(["infer"]))):
                    with pytest.raises(grpc.RpcError) as caught:
                        channel.unary_unary(method)(b"", metadata=list(given.items()), timeout=30)
                    codes.append(caught.value.code().name)
                assert codes == ["UNAUTHENTICATED", "PERMISSION_DENIED"]


@pytest.mark.parametrize("name", ["runtime", "transformer"])
def test_an_open_route_tells_nobody_what_there_is(pair: ClosedPair, name: str) -> None:
    """Which models and adapters there are is told to who may use them; whether one is ready, to who names it."""
    server = pair.servers[name]
    for path in ("/readyz/nobody", "/v2/models/nobody/ready", "/v2/models/c/ready", "/readyz/c", "/readyz?verbose"):
        for method in ("GET", "HEAD"):
            answer = httpx.request(method, server.url + path)
            assert answer.status_code in (200, 404, 405), path
            assert not [model for model in ("other", "polite", "[+]m") if model in answer.text], (path, answer.text)
    with grpc.insecure_channel(server.grpc_url) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.GRPCInferenceServiceStub(channel).ModelReady(pb.ModelReadyRequest(name="nobody"), timeout=20)
    assert "polite" not in str(caught.value.details())
    asked = httpx.post(
        f"{pair.servers['runtime'].url}/v1/chat/completions",
        json={"model": "nobody", "messages": []},
        headers=bearer(pair.credentials.texts["infer"]),
    )
    assert "this server has: m, polite, other" in asked.json()["error"]["message"]
