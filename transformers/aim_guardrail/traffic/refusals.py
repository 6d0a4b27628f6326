"""What a client is told of its limits: that it is refused, when it may come again, and how it stands. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from aim_guardrail.traffic.local import limit_of
from aim_guardrail.traffic.windows import Charge, Standing
from aim_kserve.errors import ContentBlocked

_TYPES = {400: "invalid_request_error", 403: "permission_error", 413: "invalid_request_error", 429: "rate_limit_error"}


class TrafficRefused(ContentBlocked):
    """A rule of the family `traffic` blocks. ``retry_after_s``: when the request would pass, if ever.

    Attributes:
        told: further headers: the verdict.
    """

    def __init__(self, message: str, status: int, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, status=status, code=code, retry_after_s=retry_after_s)
        self.type = _TYPES[status]
        self.told: dict[str, str] = {}

    def headers(self) -> dict[str, str]:
        return {**super().headers(), **self.told}


def rate_exceeded(unit: str, span: str, per: str, charge: Charge, stand: Standing, wait_ms: int) -> TrafficRefused:
    """``wait_ms``: until all limits let the request pass."""
    whose = {
        "caller": "for you",
        "model": "for this model",
        "caller_model": "for you on this model",
        "global": "for all",
    }
    limit = f"{limit_of(charge)} {unit} a {span} {whose[per]}"
    if wait_ms < 0:
        return TrafficRefused(
            f"the limit is {limit}, and this request may take {charge.cost}: shorten it or lower max_tokens",
            429,
            "request_too_large",
        )
    wait_s = wait_ms / 1000
    asked = f", {stand.used} are used and this request may take {charge.cost}" if unit == "tokens" else ""
    return TrafficRefused(
        f"the limit is {limit}{asked}: ask again in {max(1, -int(-wait_s // 1))} s", 429, "rate_limit_exceeded", wait_s
    )


def headers(unit: str, stands: Iterable[tuple[Charge, Standing]]) -> dict[str, str]:
    """``x-ratelimit-{limit,remaining,reset}-{requests,tokens}``, as OpenAI names them, of the tightest limit."""
    charge, stand = min(stands, key=lambda each: (limit_of(each[0]) - each[1].used, -each[1].reset_ms))
    return {
        f"x-ratelimit-limit-{unit}": str(limit_of(charge)),
        f"x-ratelimit-remaining-{unit}": str(max(0, limit_of(charge) - stand.used)),
        f"x-ratelimit-reset-{unit}": duration(stand.reset_ms),
    }


def duration(milliseconds: int) -> str:
    """As Go and OpenAI write it: ``17ms``, ``1s``, ``6m0s``, ``1h0m0s``."""
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    seconds = -(-milliseconds // 1000)
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
