"""Anthropic's Messages API: what stands where in its bodies and events, and how it says that something is refused.

https://docs.anthropic.com/en/api/messages, and what vLLM adds.
"""

from __future__ import annotations

from collections.abc import Mapping

from aim_guardrail.protocols.places import COMMON, ERROR, SCHEMA, WHOLE, place_with
from aim_guardrail.slots.places import FILE, FREE, ID, JSON, LINK, TEXT, WORD, Place
from aim_guardrail.slots.slot import Json
from aim_kserve.errors import ServingError

_CACHE = Place(type=WORD, ttl=TEXT)
_SOURCE = Place(type=WORD, media_type=TEXT, data=FILE, url=LINK, file_id=ID)

# A content block: text, a picture, a document, a tool's call and its result, what was thought.
_BLOCK = Place(
    parts=True,
    type=WORD,
    text=TEXT,
    thinking=TEXT,
    signature=WHOLE,
    data=WHOLE,
    id=ID,
    name=TEXT,
    input=JSON,
    tool_use_id=ID,
    source=_SOURCE,
    title=TEXT,
    context=TEXT,
    citations=WHOLE,
    cache_control=_CACHE,
)
_BLOCK.children["content"] = _BLOCK
_SOURCE.children["content"] = _BLOCK

MESSAGES = place_with(
    COMMON,
    messages=Place(role=WORD, content=_BLOCK),
    system=_BLOCK,
    content=_BLOCK,
    role=WORD,
    stop_reason=WORD,
    stop_sequence=TEXT,
    stop_sequences=TEXT,
    tools=Place(name=WHOLE, type=WORD, description=TEXT, input_schema=SCHEMA, cache_control=_CACHE),
    tool_choice=Place(type=WORD, name=TEXT),
    thinking=Place(type=WORD, display=WORD),
    error=ERROR,
    request_id=ID,
)
EVENT = Place(
    type=WORD,
    message=MESSAGES,
    content_block=_BLOCK,
    delta=Place(type=WORD, stop_reason=WORD, stop_sequence=TEXT, stop_details=FREE),
    error=ERROR,
    request_id=ID,
)
"""An event of a streamed message, but for a block's deltas."""
BLOCK_DELTA = Place(type=WORD, text=TEXT, thinking=TEXT, partial_json=JSON, signature=TEXT, citation=WHOLE)

_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: ServingError) -> Json:
    """An error in Anthropic's shape; `code`, which that has not, says more exactly what it is."""
    said = {"type": _TYPES.get(error.status, "api_error"), "message": error.message}
    return {"type": "error", "error": {**said, "code": error.code} if error.code else said}


def refusal(answer: Json) -> Json:
    """A message whose content was blocked."""
    kept: Json = {key: answer[key] for key in ("id", "model", "usage") if key in answer}
    ends: Json = {"stop_reason": "refusal", "stop_sequence": None}
    return {**kept, "type": "message", "role": "assistant", "content": [], **ends}
