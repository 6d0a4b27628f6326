"""Those that wait, by class, and whose turn it is."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection

from aim_kserve.identity.caller import QosClass

from .fair import FairQueue
from .policy import QosPolicy
from .request import CLASSES, Ask
from .ticket import Ticket


class Queue:
    """Each stands at a level: its class, or the one above once a low one has waited ``ageing_s``."""

    def __init__(self, policy: QosPolicy) -> None:
        self._ageing_s = policy.ageing_s
        self.fair = {name: FairQueue(policy.weight) for name in CLASSES}
        self._oldest = {name: OrderedDict[int, Ticket]() for name in CLASSES}  # by level, in order of arrival
        self.counts: Counter[tuple[QosClass, str]] = Counter()  # by the class asked for, and tenant
        self.count_of: dict[QosClass, int] = dict.fromkeys(CLASSES, 0)
        self.size = 0  # how many wait

    def __len__(self) -> int:
        return self.size

    def push(self, ticket: Ticket) -> None:
        """It waits from now on; one that was a victim before those that came later."""
        self._place(ticket)
        self._oldest[ticket.level].move_to_end(ticket.number, last=not ticket.replays)
        self.size += 1
        self.counts[ticket.ask.qos_class, ticket.ask.tenant] += 1
        self.count_of[ticket.ask.qos_class] += 1

    def remove(self, ticket: Ticket) -> None:
        """It waits no longer, and was not dispatched."""
        self.fair[ticket.level].remove(ticket)
        self._uncount(ticket)

    def start(self, ticket: Ticket) -> None:
        """It was dispatched."""
        self.fair[ticket.level].start(ticket)
        self._uncount(ticket)

    def head(self) -> tuple[Ticket, QosClass] | None:
        """Whose turn it is, and the level at which it waits; None: nobody waits."""
        for name in CLASSES:
            head = self.fair[name].head()
            if head is not None:
                return head, name
        return None

    def overdue(self, now_s: float) -> Ticket | None:
        """Whose turn it is among the medium ones, if one of them has waited too long."""
        at_s = self.ages_s("medium")
        return self.fair["medium"].head() if at_s is not None and at_s <= now_s else None

    def age(self, now_s: float) -> None:
        """Low ones that have waited too long stand among the medium ones from now on."""
        low = self._oldest["low"]
        while low:
            ticket = next(iter(low.values()))
            if ticket.arrived_s + self._ageing_s > now_s:
                return
            self.fair["low"].remove(ticket)
            del low[ticket.number]
            ticket.level = ticket.served_as = "medium"
            self._place(ticket)

    def ages_s(self, level: QosClass) -> float | None:
        """When the one that has waited longest there has waited too long."""
        oldest = self.oldest(level)
        return None if oldest is None else oldest.arrived_s + self._ageing_s

    def oldest(self, level: QosClass) -> Ticket | None:
        """The one that has waited longest there."""
        return next(iter(self._oldest[level].values()), None)

    def crowding(self, ask: Ask, weight: Callable[[str], float]) -> Ticket | None:
        """The latest request of the tenant that waits in that class with most, by weight, if it has more there than the
        asking one would. Linear in those that wait: only where a queue is full."""
        shares = {tenant: n / weight(tenant) for (name, tenant), n in self.counts.items() if name == ask.qos_class}
        own = (self.counts[ask.qos_class, ask.tenant] + 1) / weight(ask.tenant)
        most = max(shares, key=shares.__getitem__, default=ask.tenant)
        if shares.get(most, 0.0) <= own:
            return None
        standing = (ticket for name in ("low", "medium", "high") for ticket in reversed(self._oldest[name].values()))
        return next(each for each in standing if (each.ask.qos_class, each.ask.tenant) == (ask.qos_class, most))

    def ahead_of(self, ask: Ask, levels: Collection[QosClass]) -> tuple[int, int]:
        """Prompt tokens and answers that are dispatched before it, of those that wait there."""
        parts = [self.fair[name].ahead_of(ask.tenant if name == ask.qos_class else None) for name in levels]
        return sum(prompts for prompts, _ in parts), sum(choices for _, choices in parts)

    def _place(self, ticket: Ticket) -> None:
        """One without a deadline is due when it has waited too long, so that those with one cannot pass it for ever."""
        due_s = ticket.arrived_s + self._ageing_s if ticket.deadline_s is None else ticket.deadline_s
        self.fair[ticket.level].push(ticket, due_s)
        self._oldest[ticket.level][ticket.number] = ticket

    def _uncount(self, ticket: Ticket) -> None:
        key = ticket.ask.qos_class, ticket.ask.tenant
        del self._oldest[ticket.level][ticket.number]
        self.size -= 1
        self.count_of[ticket.ask.qos_class] -= 1
        self.counts[key] -= 1
        if not self.counts[key]:
            del self.counts[key]
