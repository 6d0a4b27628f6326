"""What the bodies of a route are, and how it says that something is refused.

A route that is not here is nobody's: its bodies are `FREE`, checked to their last string (`/score`, `/rerank`,
`/classify`, `/pooling`, `/tokenize`, KServe's V1, and what is new to us).
"""

from __future__ import annotations

from aim_guardrail.protocols import messages
from aim_guardrail.protocols.messages import MESSAGES
from aim_guardrail.protocols.places import CHAT, EMBEDDINGS, RESPONSES, V2
from aim_guardrail.slots.places import FREE, Place
from aim_guardrail.slots.slot import Json
from aim_kserve.errors import ServingError

_BY_ENDPOINT = {
    "chat/completions": CHAT,
    "completions": CHAT,
    "responses": RESPONSES,
    "embeddings": EMBEDDINGS,
    "messages": MESSAGES,
    "messages/count_tokens": MESSAGES,
}


def endpoint(path: str) -> str:
    """``chat/completions`` of ``/v1/chat/completions`` or ``/openai/v1/chat/completions``; other paths as they are."""
    return path.removeprefix("/openai").removeprefix("/v1/")


def place_of(named: str) -> Place:
    """What the root of an endpoint's bodies is."""
    if named.startswith("/v2/") and named.endswith("/infer"):
        return V2
    return _BY_ENDPOINT.get(named, FREE)


def speaks_anthropic(path: str) -> bool:
    """Whether a route is of Anthropic's API."""
    return endpoint(path).startswith("messages") and _BY_ENDPOINT.get(endpoint(path)) is MESSAGES


def speaks_openai(path: str) -> bool:
    """Whether errors have OpenAI's shape; KServe's V1 and V2 clients read ``{"error": "text"}``."""
    return not path.startswith("/v2") and not path.endswith((":predict", ":explain"))


def error_body(path: str, error: ServingError) -> Json:
    """An error as the clients of a route read it."""
    if speaks_anthropic(path):
        return messages.error_body(error)
    return error.body() if speaks_openai(path) else {"error": error.message}
