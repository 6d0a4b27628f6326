"""Whether a first token can still come in time: asked when a request arrives, while it waits, and when it is its turn.

The deadline is the request's own ``ttft_slo_s``, or its class's. On arrival nine of ten must be served by it, or at
most ``epsilon`` later; while it waits, it is dropped as soon as its own prompt alone takes too long, and at the
deadline at the latest. Once dispatched it is never refused.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import NamedTuple

from aim_kserve.identity.caller import QosClass

from .policy import QosPolicy
from .request import CLASSES, Ask, Rejected
from .ticket import Ticket
from .ttft import Ttft

#: The golden ratio's fraction: its multiples are spread as evenly as can be.
_GOLDEN = 0.6180339887498949
#: Of what it says, how much later at most a client is told to come back.
_JITTER = 0.25
_LONGEST_S = 480.0
#: Entries of the heap that may be of requests gone before it is built anew.
_SLACK = 64
#: For so long one refusal stands for those that ask for no less.
_SAME_S = 0.05
#: What has no deadline is predicted to learn from it, and so often at most.
_LEARN_S = 0.05


@dataclass(frozen=True, slots=True)
class Before:
    """What is served before a request: of those that wait, together, and those that run; slots: that it may use."""

    waiting: Sequence[Ticket]
    running: Sequence[Ticket]
    slots: int


class _Refused(NamedTuple):
    ticket: Ticket
    predicted_s: float
    slo_s: float


def retry_after(seconds: float, ticket: Ticket) -> float:
    """Whole seconds after which to come back, 1 to 600: by then all may be otherwise. Up to a quarter later, so that
    those refused together do not come back together. The same ticket, the same answer."""
    return float(ceil(min(_LONGEST_S, max(1.0, seconds)) * (1 + _JITTER * (ticket.number * _GOLDEN % 1.0))))


class Deadlines:
    """ttft: says when first tokens come, and is told when they did."""

    def __init__(self, policy: QosPolicy, ttft: Ttft) -> None:
        self._policy, self._ttft = policy, ttft
        slos = {name: policy.of(name).slo for name in CLASSES}
        self._promised_s = {name: slo.ttft_ms / 1000 for name, slo in slos.items() if slo is not None}
        self._watched: list[tuple[float, int, Ticket]] = []
        self._refused: dict[QosClass, _Refused] = {}
        self._learns_s = -inf

    def admit(self, ticket: Ticket, before_it: Callable[[Ask], Before]) -> None:
        """Give it its deadline.

        Raises:
            Rejected: ``deadline``: its first token is not going to come in time.
        """
        slo_s = ticket.ask.ttft_slo_s
        if slo_s is None:
            slo_s = self._promised_s.get(ticket.ask.qos_class)
        if slo_s is not None:
            self._refuse_like_the_last(ticket, slo_s)
        elif ticket.arrived_s < self._learns_s:
            return
        self._learns_s = ticket.arrived_s + _LEARN_S
        before = before_it(ticket.ask)
        ticket.prediction = self._ttft.predict(before.waiting, before.running, ticket.ask, before.slots)
        if slo_s is None:
            return
        latest_s = slo_s * (1 + self._policy.epsilon)
        if ticket.prediction.q90_s > latest_s:
            self._refused[ticket.ask.qos_class] = _Refused(ticket, ticket.prediction.q90_s, slo_s)
            raise self._refusal(ticket, ticket.prediction.q90_s, slo_s)
        ticket.deadline_s = ticket.arrived_s + slo_s

    def _refuse_like_the_last(self, ticket: Ticket, slo_s: float) -> None:
        """What asks for no less than one that was refused a moment ago: a flood must not cost a prediction each."""
        last = self._refused.get(ticket.ask.qos_class)
        if last is None or ticket.arrived_s - last.ticket.arrived_s > _SAME_S:
            return
        alike = last.ticket.ask.tenant == ticket.ask.tenant and last.slo_s >= slo_s
        if alike and last.ticket.ask.prompt_tokens <= ticket.ask.prompt_tokens:
            raise self._refusal(ticket, last.predicted_s, slo_s)

    def watch(self, ticket: Ticket, waiting: int) -> None:
        """It waits. waiting: how many do."""
        slo_s = self._slo_s(ticket.ask)
        if slo_s is None:
            return
        latest_s = ticket.arrived_s + slo_s * (1 + self._policy.epsilon)
        ticket.hopeless_s = min(ticket.arrived_s + slo_s, latest_s - self._alone_s(ticket, ()))
        heapq.heappush(self._watched, (ticket.hopeless_s, ticket.number, ticket))
        if len(self._watched) > 2 * waiting + _SLACK:
            self._watched = [entry for entry in self._watched if entry[2].state == "waiting"]
            heapq.heapify(self._watched)

    def past(self, now_s: float) -> list[Ticket]:
        """Those waiting that cannot be served in time any more; each is named once."""
        found = []
        while self._watched and self._watched[0][0] <= now_s:
            ticket = heapq.heappop(self._watched)[2]
            if ticket.state == "waiting":
                found.append(ticket)
        return found

    def next_s(self) -> float | None:
        """When the next one is past."""
        while self._watched and self._watched[0][2].state != "waiting":
            heapq.heappop(self._watched)
        return self._watched[0][0] if self._watched else None

    def hopeless(self, ticket: Ticket, running: Sequence[Ticket], now_s: float) -> bool:
        """Whether it comes too late though it is dispatched now."""
        slo_s = self._slo_s(ticket.ask)
        if slo_s is None:
            return False
        latest_s = ticket.arrived_s + slo_s * (1 + self._policy.epsilon)
        return now_s + self._alone_s(ticket, running) > latest_s

    def too_late(self, ticket: Ticket, now_s: float) -> Rejected:
        """How one that has waited in vain is refused."""
        return self._refusal(ticket, now_s - ticket.arrived_s, self._slo_s(ticket.ask) or 0.0)

    def _alone_s(self, ticket: Ticket, running: Sequence[Ticket]) -> float:
        """To its first token, as likely as not, if it need not wait for a slot."""
        slots = ticket.ask.choices + sum(each.ask.choices for each in running)
        return self._ttft.predict((), running, ticket.ask, slots).p50_s

    def _refusal(self, ticket: Ticket, predicted_s: float, slo_s: float) -> Rejected:
        return Rejected(
            "deadline",
            f"the first token would come after {predicted_s:.3g} s, and is wanted within {slo_s:.3g} s: "
            "ask again later, or allow more time",
            retry_after(predicted_s - slo_s, ticket),
        )

    def _slo_s(self, ask: Ask) -> float | None:
        if ask.ttft_slo_s is not None:
            return ask.ttft_slo_s
        return self._promised_s.get(ask.qos_class)
