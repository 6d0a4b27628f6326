"""What the scheduler is asked, and how it refuses. Times are seconds of the clock it is given."""

from __future__ import annotations

from typing import Literal, NamedTuple

from aim_kserve.identity.caller import QosClass

#: Most urgent first.
CLASSES: tuple[QosClass, ...] = ("high", "medium", "low")

#: Why one was not served. ``queue_full``: as many wait as may; ``rate``: its budget of requests or tokens is used up;
#: ``deadline``: its first token would come too late; ``too_large``: it fits into no engine; ``throttled``: a class
#: above burns its error budget.
Reason = Literal["queue_full", "rate", "deadline", "too_large", "throttled"]


class Ask(NamedTuple):
    """One request, as the scheduler sees it.

    ``prompt_tokens``: those that must be computed, estimated before the engine has counted them. ``max_tokens``: the
    most its answers may have, each; None: up to the model's limit. ``choices``: answers that are computed side by side
    (``n``, several prompts): a slot each. ``ttft_slo_s``: the first token is wanted within so many seconds of the
    arrival; None: whenever.
    """

    tenant: str
    qos_class: QosClass
    prompt_tokens: int
    max_tokens: int | None = None
    choices: int = 1
    ttft_slo_s: float | None = None
    model: str = ""


class Rejected(Exception):
    """It is not served, and nothing of it has been begun.

    Args:
        reason: for metrics and the error's ``code``.
        message: one sentence for the client.
        retry_after_s: when a new try may succeed; None: never.
    """

    def __init__(self, reason: Reason, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.reason, self.message, self.retry_after_s = reason, message, retry_after_s
