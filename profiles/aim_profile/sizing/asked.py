"""What is asked of a served model: how long requests are, and what is promised of their latency."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RequestShape(BaseModel):
    """Tokens of a request on average: its prompt and its answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: int = Field(ge=1, le=2**24)
    answer_tokens: int = Field(ge=1, le=2**24)

    @property
    def context(self) -> int:
        """Tokens it holds at its end."""
        return self.prompt_tokens + self.answer_tokens


class Promise(BaseModel):
    """Milliseconds to the first token and between two tokens, on average over requests; None: nothing is promised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ttft_ms: float | None = Field(default=None, gt=0, le=3_600_000)
    itl_ms: float | None = Field(default=None, gt=0, le=3_600_000)

    def taken(self, ttft_ms: float, itl_ms: float) -> float:
        """How much of it those latencies take, of the one that takes more: at most 1 keeps it."""
        pairs = ((ttft_ms, self.ttft_ms), (itl_ms, self.itl_ms))
        return max((found / promised for found, promised in pairs if promised is not None), default=0.0)
