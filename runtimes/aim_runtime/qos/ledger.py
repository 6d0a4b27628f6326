"""What of an engine is taken, and what each class may still take of it.

A request's footprint is a slot for each of its answers, and in the KV cache the part of its prompt that is not shared,
and its answers as long as four in five of its class become: ``uncached + choices * min(max_tokens, q80(length))``. What
becomes known replaces what was thought: the prompt at its count, the answers as they grow.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import inf

from aim_kserve.identity.caller import QosClass

from .lengths import Lengths
from .policy import QosPolicy
from .request import CLASSES, Ask
from .ticket import Ticket

#: Of a class's answers, so many are no longer than what is set aside for one.
_QUANTILE = 0.8
_KEPT_S = 0.5
#: A prompt's tokens are estimated: one that may still fit is the engine's to refuse, which counts them.
_DOUBT = 1.5


def reserves(policy: QosPolicy, slots: int, parks: bool) -> dict[QosClass, int]:
    """How many slots each class leaves free for those above it.

    Where the policy does not say: none for high, an eighth for medium, a quarter for low, rounded down, so that an
    engine of one slot serves all; none where a running request can be paused instead.
    """
    share = 0 if parks else slots // 8
    found: dict[QosClass, int] = {}
    least = 0
    for at, name in enumerate(CLASSES):
        listed = policy.of(name).reserve_slots
        later = [given for below in CLASSES[at:] if (given := policy.of(below).reserve_slots) is not None]
        least = max(least, min([at * share, *later])) if listed is None else listed
        found[name] = least
    return found


class Ledger:
    """Args:
    parks: whether the engine pauses the least urgent of what runs when more is dispatched than it has slots for.
    lengths: of the engine's answers.
    """

    def __init__(
        self,
        policy: QosPolicy,
        clock: Callable[[], float],
        *,
        slots: int,
        kv_tokens: int | None,
        parks: bool,
        lengths: Lengths,
    ) -> None:
        self._policy, self._clock, self._lengths = policy, clock, lengths
        self.parks = parks and policy.preemption == "pause"
        self._held: dict[int, Ticket] = {}
        self._usually = dict.fromkeys(CLASSES, (0, -inf))  # tokens, until when that is taken to be so
        self.slots_used = self.kv_used = 0
        self._slots_by_level = dict.fromkeys(CLASSES, 0)
        self.resize(slots, kv_tokens)

    def resize(self, slots: int, kv_tokens: int | None) -> None:
        """The engine's capacity is another; what is held stays held."""
        self.slots, self.kv_tokens = slots, kv_tokens
        self._reserves = reserves(self._policy, slots, self.parks)

    @property
    def parked_slots(self) -> int:
        """Answers that were begun and are paused, because more urgent ones have their slots."""
        return max(0, self.slots_used - self.slots)

    def expected_tokens(self, ask: Ask, at_least: int = 0) -> int:
        """How long each of its answers is thought to become, once it has ``at_least``."""
        if at_least:
            expected = self._quantile(ask.qos_class, at_least)
        else:  # of one that has not begun it changes slowly
            (expected, until_s), now_s = self._usually[ask.qos_class], self._clock()
            if now_s >= until_s:
                expected = self._quantile(ask.qos_class, 0)
                self._usually[ask.qos_class] = expected, now_s + _KEPT_S
        most = ask.max_tokens
        return expected if most is None or expected < most else most

    def _quantile(self, qos_class: QosClass, at_least: int) -> int:
        return self._lengths.quantile(qos_class, _QUANTILE, at_least)

    def too_large(self, ask: Ask) -> str | None:
        """Why the engine could not hold it even alone; None: it could."""
        if 0 < self.slots < ask.choices:
            return (
                f"{ask.choices} answers at once are asked for; the engine computes at most {self.slots}: ask for fewer"
            )
        if self.kv_tokens and ask.prompt_tokens + ask.choices > _DOUBT * self.kv_tokens:
            return (
                f"the prompt has some {ask.prompt_tokens} tokens; the engine holds {self.kv_tokens}: shorten the prompt"
            )
        return None

    def fits(self, ticket: Ticket, served_as: QosClass, *, share: float | None = None, pause: bool = True) -> bool:
        """Whether there is room for it beside what runs, if it is served as that class. One that would be alone always
        has it, whatever its class leaves free for others. share: of the slots, what its level may have. pause: whether
        less urgent ones may be paused for it.
        """
        slots = ticket.ask.choices
        if not self._held:
            return slots <= self.slots
        if share is not None and self._slots_by_level[ticket.level] + slots > share * self.slots:
            return False
        over, paused = self.slots_used + slots - self.slots, list[Ticket]()
        if over > -self._reserves[served_as]:
            paused = self._to_pause(over, served_as) if pause and slots <= self.slots else []
            if sum(held.ask.choices for held in paused) < max(1, over):
                return False
        if self.kv_tokens is None:
            return True
        ceiling = self._policy.ceiling(served_as) * self.kv_tokens
        kv_used = self.kv_used - sum(held.kv_tokens for held in paused)
        return kv_used + min(_kv_tokens(ticket), int(ceiling)) <= ceiling

    def take(self, ticket: Ticket) -> None:
        """It runs from now on."""
        ticket.kv_tokens = kv_tokens = _kv_tokens(ticket)
        self._held[ticket.number] = ticket
        self.kv_used += kv_tokens
        self.slots_used += ticket.ask.choices
        self._slots_by_level[ticket.level] += ticket.ask.choices

    def update(self, ticket: Ticket) -> None:
        """Its prompt was counted, or its answers have grown."""
        if ticket.number in self._held:
            self.release(ticket)
            self.take(ticket)

    def release(self, ticket: Ticket) -> None:
        """It runs no longer."""
        del self._held[ticket.number]
        self.kv_used -= ticket.kv_tokens
        self.slots_used -= ticket.ask.choices
        self._slots_by_level[ticket.level] -= ticket.ask.choices

    def would_fit(self, ticket: Ticket, without: list[Ticket]) -> bool:
        """Whether there were room for it, if those had not been begun."""
        for each in without:
            self.release(each)
        fits = self.fits(ticket, ticket.level)
        for each in without:
            self.take(each)
        return fits

    def may_use(self, served_as: QosClass) -> int:
        """Slots that the class may have if it is alone."""
        return max(min(1, self.slots), self.slots - self._reserves[served_as])

    def _to_pause(self, over: int, served_as: QosClass) -> list[Ticket]:
        """The last come of the less urgent ones, ``over`` slots of them, those paused already included; fewer where
        there are not as many, and never more than there are slots. What they hold of the cache is put aside with them.
        """
        if not self.parks or not 0 < over <= self.slots:
            return []
        rank, now_s = CLASSES.index(served_as), self._clock()
        below = [held for held in self._held.values() if self._rank(held, now_s) > rank]
        below.sort(key=lambda held: (self._rank(held, now_s), held.arrived_s), reverse=True)
        slots = list(accumulate((held.ask.choices for held in below), initial=0))
        return [held for held, before in zip(below, slots, strict=False) if before < over]

    def _rank(self, ticket: Ticket, now_s: float) -> int:
        """A low one that runs ages as those do that wait: then nothing but high pauses it."""
        rank = CLASSES.index(ticket.served_as)
        return min(rank, 1) if now_s - ticket.arrived_s >= self._policy.ageing_s else rank


def _kv_tokens(ticket: Ticket) -> int:
    return ticket.uncached_tokens + ticket.ask.choices * ticket.expected_tokens
