"""Each kind of client gets its own error shape; nothing is a 500 that is not our fault, and no 500 tells tales."""

from __future__ import annotations

import pytest
from starlette.exceptions import HTTPException

from aim_kserve.errors import (
    GRPC_CODE_BY_STATUS,
    BadRequest,
    ContentBlocked,
    NotFound,
    Overloaded,
    ServingError,
    TooLarge,
    Unavailable,
    UpstreamFailed,
)
from aim_kserve.http import speaks_openai
from aim_kserve.kserve import (
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ServerNotLive,
    ServerNotReady,
    UnsupportedProtocol,
)
from aim_kserve.rest import _label_json, as_serving_error


@pytest.mark.parametrize(
    ("error", "status", "grpc"),
    [
        (BadRequest("x"), 400, "INVALID_ARGUMENT"),
        (ContentBlocked("x"), 400, "INVALID_ARGUMENT"),
        (NotFound("x"), 404, "NOT_FOUND"),
        (TooLarge("x"), 413, "RESOURCE_EXHAUSTED"),
        (Overloaded("x"), 429, "RESOURCE_EXHAUSTED"),
        (Unavailable("x"), 503, "UNAVAILABLE"),
        (UpstreamFailed("x"), 502, "UNAVAILABLE"),
        (ServingError("x"), 500, "INTERNAL"),
        (InvalidInput("x"), 400, "INVALID_ARGUMENT"),
        (ModelNotFound("m"), 404, "NOT_FOUND"),
        (ModelNotReady("m"), 503, "UNAVAILABLE"),
        (ServerNotReady(), 503, "UNAVAILABLE"),
        (ServerNotLive(), 503, "UNAVAILABLE"),
        (UnsupportedProtocol("v3"), 400, "INVALID_ARGUMENT"),
        (InferenceError("x"), 500, "INTERNAL"),
        (NotImplementedError("x"), 501, "UNIMPLEMENTED"),
        (HTTPException(405), 405, "FAILED_PRECONDITION"),
        (ZeroDivisionError("secret"), 500, "INTERNAL"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_has_a_status_in_both_protocols(error: Exception, status: int, grpc: str) -> None:
    refusal = as_serving_error(error)
    assert (refusal.status, refusal.grpc_code) == (status, grpc)
    assert "secret" not in refusal.message
    assert ("retry-after" in refusal.headers()) is (status in (429, 502, 503))
    assert refusal.body()["error"]["type"] == type(refusal).type


def test_no_refusal_is_as_long_as_what_it_refuses() -> None:
    refusal = BadRequest(f"'{'x' * 10**6}' is no field: leave it out", param="y" * 10**6)
    assert len(refusal.message) < 2500
    assert refusal.message.endswith("is no field: leave it out")
    assert len(refusal.body()["error"]["param"]) < 500
    assert BadRequest("short", param="n").body()["error"]["param"] == "n"


def test_grpc_codes_exist() -> None:
    import grpc

    assert all(hasattr(grpc.StatusCode, code) for code in GRPC_CODE_BY_STATUS.values())


@pytest.mark.parametrize(
    ("path", "openai"),
    [
        ("/v1/chat/completions", True),
        ("/openai/v1/x", True),
        ("/v1/models/m", True),
        ("/v1/models/m:predict", False),
        ("/v2/models/m/infer", False),
    ],
)
def test_whospeaks_openai(path: str, openai: bool) -> None:
    assert speaks_openai(path) is openai


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ([], b"application/json"),
        ([(b"content-type", b"application/x-www-form-urlencoded")], b"application/json"),
        ([(b"content-type", b"text/plain")], b"text/plain"),
        (
            [(b"content-type", b"application/json"), (b"inference-header-content-length", b"5")],
            b"application/octet-stream",
        ),
        ([(b"inference-header-content-length", b"5")], b"application/octet-stream"),
    ],
)
def test_what_a_body_is_taken_for(headers: list[tuple[bytes, bytes]], kind: bytes) -> None:
    labelled = [value for key, value in _label_json(headers) if key == b"content-type"]
    assert labelled == [kind]
