"""What one direction of a request came to, for whoever looks on: an audit, feedback, a shadow policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.ruling import Ruling
from aim_guardrail.pipeline.usage import NOT_TOLD, Usage
from aim_guardrail.policy import Direction, Policy, Verdict
from aim_guardrail.slots.slot import Slots

Outcome = Literal["allowed", "flagged", "redacted", "blocked", "error", "client_gone"]


@dataclass(frozen=True, slots=True)
class Answered:
    """How one rule was answered, for audits, traces and metrics.

    Attributes:
        rule: its name.
        result: `allowed`, `flagged`, `redacted`, `blocked`; `timeout`, `error`, `misconfigured`; `skipped_budget`,
            `skipped_breaker`, `skipped_early_stop`.
        began_s: when it was asked, by ``time.monotonic``.
        seconds: until it answered, or was given up.
    """

    rule: str
    family: str
    direction: Direction
    result: str
    began_s: float
    seconds: float


class Course(NamedTuple):
    """One direction of one request, from its first text to its end.

    Attributes:
        action: the strictest of the policy's rules: `allow`, `flag`, `redact`, `block`.
        outcome: what became of it, which may be an error whatever was found.
        error: the code of the error; None where there is none.
        verdicts: of its texts, those that are more than a mere allow.
        answered: how each batch detector was.
        degraded: the rules that gave no answer, where the policy lets that pass; of both directions.
        usage: tokens, as the predictor told.
        check_s: seconds spent on checking; `since_s`: from the request's arrival until now.
    """

    direction: Direction
    context: RequestContext
    policy: Policy
    action: str
    outcome: Outcome
    error: str | None
    verdicts: Sequence[Verdict]
    answered: Sequence[Answered]
    degraded: Sequence[str]
    check_s: float
    since_s: float
    usage: Usage = NOT_TOLD


class Witness(Protocol):
    """Is told of one request. Whatever it does, the request's answer is the same."""

    @property
    def hears(self) -> bool:
        """Whether it wants bodies, as they came."""

    @property
    def keeps(self) -> bool:
        """Whether it wants slots."""

    def content(self, direction: Direction, data: bytes) -> None:
        """A body, or the next part of it. From any thread, one after another."""

    def slots(self, direction: Direction, slots: Slots, rulings: Sequence[Ruling]) -> None:
        """Texts, and what the inline stage makes of them: nothing behind one that it blocks has been judged. From any
        thread, one after another."""

    async def ended(self, course: Course) -> None:
        """A direction has come to its end, once for each that had begun."""

    def left(self) -> None:
        """The request is over."""
