"""What a trace says of one request: its attributes and phases. Pure; :mod:`aim_runtime.tracing` sends it.

Names: the semantic conventions for generative AI, https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from aim_kserve.access import RequestLog

Attributes = dict[str, str | int | float | bool]

_OPERATIONS = {
    "chat/completions": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
    "responses": "chat",
}
#: Fields of a body and the attributes that they are.
_ASKED = {
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One request to an engine that has ended. Times are seconds since it came; None where nobody knows."""

    operation: str
    model_name: str
    adapter: str
    variant: str
    engine: str
    status: int
    body: Mapping[str, Any]
    streamed: bool
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    queue_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    duration_s: float

    @property
    def kind(self) -> str:
        """``gen_ai.operation.name``; our own name where the conventions have none."""
        return _OPERATIONS.get(self.operation, self.operation)

    @property
    def asked_model(self) -> str:
        return self.adapter or self.model_name


class SpanSink(Protocol):
    """Takes every request that has ended; must not block."""

    def record(self, log: RequestLog, call: Call) -> None: ...


def phases(call: Call) -> list[tuple[str, float, float]]:
    """Name, start and end of each phase, in seconds since the request came. Queue and prefill are one phase where the
    engine does not tell them apart; where nobody saw a first token, there is neither prefill nor decode."""
    found = []
    if call.queue_s is not None:
        found.append(("queue", 0.0, call.queue_s))
    if call.first_token_s is None:
        return found
    if call.queue_s is None:
        found.append(("queue and prefill", 0.0, call.first_token_s))
    else:
        found.append(("prefill", call.queue_s, max(call.queue_s, call.first_token_s)))
    if call.last_token_s is not None:
        found.append(("decode", call.first_token_s, max(call.first_token_s, call.last_token_s)))
    return found


def attributes(call: Call, request_id: str) -> Attributes:
    """Of the request's span. What was asked and answered is never among them."""
    known = {
        "gen_ai.operation.name": call.kind,
        "gen_ai.provider.name": call.engine,
        "gen_ai.request.model": call.asked_model,
        "gen_ai.response.model": call.asked_model,
        "gen_ai.request.stream": call.streamed,
        "gen_ai.usage.input_tokens": call.input_tokens,
        "gen_ai.usage.output_tokens": call.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": call.cached_tokens or None,
        "gen_ai.response.time_to_first_chunk": call.first_token_s if call.streamed else None,
        "http.response.status_code": call.status,
        "error.type": str(call.status) if call.status >= 400 else None,
        "aim.request_id": request_id,
        "aim.variant": call.variant or None,
        "aim.adapter": call.adapter or None,
        **{attribute: _number(call.body.get(name)) for name, attribute in _ASKED.items() if name in call.body},
    }
    return {name: value for name, value in known.items() if value is not None}


def _number(value: object) -> int | float | None:
    """A number that a span can carry: the client may have sent anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**63:
        return None
    return value
