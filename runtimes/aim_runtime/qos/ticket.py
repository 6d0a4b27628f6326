"""One request's place in the queue and in the ledger, from its offer to its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from aim_kserve.identity.caller import QosClass

from .request import Ask, Rejected

if TYPE_CHECKING:
    from .ttft import Prediction

#: ``waiting`` → ``running`` → ``ended``; a replayed one is ``waiting`` once more.
State = Literal["waiting", "running", "ended"]


@dataclass(slots=True, eq=False)
class Ticket:
    """What the scheduler knows of one request. Only the scheduler changes it.

    ``level``: the class among whose requests it waits, and by whose counters its tenant pays: its own, or the one above
    once it has waited too long. ``served_as``: how urgent it is to the engine. It differs from ``level`` only for one
    that was dispatched out of turn because its class would not have come to its turn at all.

    ``deadline_s``: when its first token is wanted; ``hopeless_s``: from when on, if still waiting, it is dropped; None:
    never. ``rejected``: why it was dropped. ``prompt_tokens``: as estimated, then as the engine counted them;
    ``uncached_tokens``: those of them that have to be computed.
    ``delivered``: tokens of all its answers so far; ``expected_tokens``: how long each is thought to become.
    ``prediction``: of its first token, made when it came. ``to_prefill``: prompt tokens of others that were to be
    computed when it was dispatched. ``kv_tokens``: what is set aside for it while it runs. Times are seconds of the
    scheduler's clock.
    """

    number: int
    ask: Ask
    arrived_s: float
    served_as: QosClass
    level: QosClass = field(init=False)
    state: State = "waiting"
    deadline_s: float | None = None
    hopeless_s: float | None = None
    rejected: Rejected | None = None
    dispatched_s: float | None = None
    first_token_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    delivered: int = 0
    expected_tokens: int = 0
    replays: int = 0
    prediction: Prediction | None = None
    to_prefill: int = 0
    kv_tokens: int = 0

    uncached_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.level = self.ask.qos_class
        self.uncached_tokens = max(0, self.prompt_tokens - self.cached_tokens)

    def count(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Its prompt has so many tokens."""
        self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
        self.uncached_tokens = prompt_tokens - cached_tokens if prompt_tokens > cached_tokens else 0
