"""The table of routes: what is open is open as every server reads it; nothing else is."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_kserve.identity.routes import OPEN, lenient, needed, needed_by_grpc

HEALTH = ["/", "/health", "/healthz", "/ping", "/readyz", "/readyz/m", "/readyz/org/m", "/v2/health/live"]
HEALTH += ["/v2/health/ready", "/v2/models/m/ready", "/v2/models/org/m/ready", "/v2/models/m/versions/1/ready"]
ADMIN = ["/v1/load_lora_adapter", "/openai/v1/unload_lora_adapter", "/v2/repository/index"]
ADMIN += ["/v2/repository/models/m/load", "/v2/repository/models/org/m/migrate", "/v2/models/m/trace/setting"]
INFER = ["/v1/chat/completions", "/openai/v1/completions", "/v1/models", "/v1/models/m", "/v1/models/m:predict"]
INFER += ["/v2/models/m/infer", "/v2", "/v2/models", "/v2/models/m", "/tokenize", "/version", "/load", "/docs"]
#: Spellings that some server takes for an open route, or for one that needs admin.
OTHERWISE_OPEN = ["//health", "/health/", "/HEALTH", "/%68ealth", "/healthz/../v1/models", "/readyz/../v1/models"]
OTHERWISE_OPEN += ["/health;a=b", "/readyz/%2e%2e/v1/models", "/readyz/..\\v1/models"]
OTHERWISE_OPEN += ["/v2/models/../repository/models/m/ready/../load"]
OTHERWISE_ADMIN = ["/v1//load_lora_adapter", "/V1/Load_LoRA_adapter", "/v1/load%5flora_adapter"]
OTHERWISE_ADMIN += ["/v1/x/../load_lora_adapter", "/v1/load_lora_adapter/", "/v1/%256coad_lora_adapter"]
OTHERWISE_ADMIN += ["/v2/models/../repository/models/m/load", "/v1/load_lora_adapter;x", "/v1\\load_lora_adapter"]
OTHERWISE_ADMIN += ["/openai//v1/./unload_lora_adapter", "/v1/load_lora_adapter\0", "/v1/load_lora_adapter%00.json"]
OTHERWISE_ADMIN += [
    "/v1/load_lora_adapter?x",
    "/v1/load_lora_adapter%23x",
    "/v1/" + "%" + "25" * 9 + "6coad_lora_adapter",
]


@pytest.mark.parametrize("path", HEALTH)
def test_health_is_open_to_those_who_ask_for_it(path: str) -> None:
    assert needed("GET", path) == needed("HEAD", path) == OPEN
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH"):
        assert needed(method, path)
    assert (needed("POST", path) == OPEN) == (path == "/ping")


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        *((path, "admin") for path in ADMIN),
        *((path, "infer") for path in INFER),
        ("/metrics", "metrics"),
        ("/filter", "filter"),
        ("/v1/filter/stream", "filter"),
        ("/no/such/route", "admin"),
        ("/flush_cache", "admin"),
        ("/v2/logging", "admin"),
        ("*", "admin"),
        ("", "admin"),
    ],
)
def test_what_a_route_needs(path: str, scope: str) -> None:
    for method in ("GET", "POST", "HEAD", "OPTIONS"):
        assert needed(method, path) >= {scope}


@pytest.mark.parametrize(
    "path",
    OTHERWISE_OPEN,
)
def test_another_spelling_opens_nothing(path: str) -> None:
    assert needed("GET", path) != OPEN


@pytest.mark.parametrize(
    "path",
    OTHERWISE_ADMIN,
)
def test_another_spelling_takes_no_scope_away(path: str) -> None:
    assert "admin" in needed("POST", path)


@given(
    path=st.lists(
        st.sampled_from(["v1", "v2", "..", ".", "", "models", "m", "ready", "health", "readyz", "load_lora_adapter"])
        | st.text("aZ%2e;\\/ ", max_size=4),
        max_size=8,
    ).map(lambda parts: "/" + "/".join(parts)),
    method=st.sampled_from(["GET", "POST"]),
)
def test_a_path_needs_what_it_needs_as_the_most_lenient_server_reads_it(path: str, method: str) -> None:
    assert needed(method, path) >= needed(method, lenient(path))
    assert needed(method, path) <= needed(method, quote(path))
    assert lenient(lenient(path)) == lenient(path) or "%" in lenient(path)


def test_a_path_that_is_no_routes_needs_all_there_is() -> None:
    assert needed("GET", "/readyz/" + "a" * 5000) == {"infer", "admin", "metrics", "filter"}


def test_grpc_by_the_same_table() -> None:
    def of(name: str) -> frozenset[str]:
        return needed_by_grpc(f"/inference.GRPCInferenceService/{name}")

    assert of("ServerLive") == of("ServerReady") == of("ModelReady") == OPEN
    assert of("ModelInfer") == of("ModelMetadata") == of("ServerMetadata") == {"infer"}
    assert of("RepositoryModelLoad") == of("RepositoryModelUnload") == of("RepositoryIndex") == {"admin"}
    assert of("ModelStreamInfer") == needed_by_grpc("/other.Service/ServerLive") == {"admin"}
