"""A server's refusals as ours: OpenAI's error object, and what FastAPI, SGLang and llama.cpp make of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from aim_kserve.errors import (
    BadRequest,
    NotFound,
    Overloaded,
    ServingError,
    TooLarge,
    Unavailable,
    UnsupportedMedia,
    UpstreamFailed,
)

_BY_STATUS: Mapping[int, type[ServingError]] = {
    404: NotFound,
    413: TooLarge,
    415: UnsupportedMedia,
    429: Overloaded,
    502: UpstreamFailed,
    503: Unavailable,
}
#: Of an error inside a stream, which has no status of its own.
_BY_TYPE = {"invalid_request_error": 400, "rate_limit_error": 429}
_LONGEST_RETRY_S = 300.0


def from_answer(status: int, body: bytes, retry_after: str | None = None) -> ServingError:
    """What a client is told of an answer with that status, which is not 200.

    A 4xx keeps its status, but for those that speak of our own standing with the server (401, 403, 407); a 5xx is a
    503, as another try may succeed, but for 501, as none will.
    """
    info = _error_of(body)
    message = _text(info.get("message")) or f"the server answered {status} and gave no reason"
    if status in (401, 403, 407):
        return UpstreamFailed(
            f"the server does not take this runtime's key ({status}): see --server_key_file", code="engine_key_refused"
        )
    if 400 <= status < 500:
        return _refusal(status, message, info, _seconds(retry_after))
    if status == 501:
        return ServingError(message, status=501, param=_text(info.get("param")), code=_code(info))
    if status >= 500:
        return Unavailable(message, code=_code(info), retry_after_s=_seconds(retry_after))
    return UpstreamFailed(f"the server answered {status} instead of 200", code="engine_answer_malformed")


def in_answer(value: Any) -> ServingError | None:
    """The error that a 200 or an event of a stream holds instead of an answer; None if it holds an answer."""
    if not isinstance(value, dict) or not ("error" in value or value.get("object") == "error"):
        return None
    if value.get("object") != "error" and not value["error"]:
        return None
    info = _info(value)
    message = _text(info.get("message")) or "the server broke the answer off and gave no reason"
    code = info.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else _BY_TYPE.get(str(info.get("type")), 503)
    if 400 <= status < 500:
        return _refusal(status, message, info, None)
    return Unavailable(message, code=_code(info))


def malformed(what: str) -> UpstreamFailed:
    return UpstreamFailed(f"the server's answer is none: {what}", code="engine_answer_malformed")


def _refusal(status: int, message: str, info: Mapping[str, Any], retry_after_s: float | None) -> ServingError:
    param = _text(info.get("param"))
    code = "model_not_found" if status == 404 and param == "model" else _code(info)
    kind = _BY_STATUS.get(status, BadRequest)
    return kind(message, status=status, param=param, code=code, retry_after_s=retry_after_s)


def _error_of(body: bytes) -> Mapping[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return _info(value) if isinstance(value, dict) else {}


def _info(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """``{"error": {…}}``; SGLang's ``{"object": "error", "message": …}``; a bare text; FastAPI's ``{"detail": …}``."""
    for name in ("error", "detail"):
        if isinstance(value.get(name), dict):
            return dict(value[name])
        if value.get(name) and name not in ("message",):
            return {"message": value[name] if isinstance(value[name], str) else orjson.dumps(value[name]).decode()}
    return value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _code(info: Mapping[str, Any]) -> str | None:
    """vLLM, SGLang and llama.cpp repeat the HTTP status here, which is no code of OpenAI's."""
    return _text(info.get("code"))


def _seconds(retry_after: str | None) -> float | None:
    """``Retry-After`` in seconds; a date is left to the default."""
    return min(float(retry_after), _LONGEST_RETRY_S) if retry_after and retry_after.isdecimal() else None
