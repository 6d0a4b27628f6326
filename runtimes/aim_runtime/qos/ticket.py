"""One request's place in the queue and in the ledger, from its offer to its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aim_kserve.identity.caller import QosClass

from .request import Ask, Rejected

#: ``waiting`` → ``running`` → ``ended``; a replayed one is ``waiting`` once more.
State = Literal["waiting", "running", "ended"]


@dataclass(slots=True, eq=False)
class Ticket:
    """What the scheduler knows of one request. Only the scheduler changes it.

    ``served_as``: the class whose turn it was served in; above its own where it had waited too long. Of a running one
    it is the urgency to tell the engine. ``rejected``: why it was dropped while it waited. ``delivered``: tokens of all
    its answers so far. Times are seconds of the scheduler's clock.
    """

    number: int
    ask: Ask
    arrived_s: float
    served_as: QosClass
    state: State = "waiting"
    rejected: Rejected | None = None
    dispatched_s: float | None = None
    first_token_s: float | None = None
    delivered: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    replays: int = 0
