"""Virtual token counters: of the tenants that wait, the one that has been served least goes first.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588). A tenant's counter grows by
what is done for it, divided by its weight. Two tenants of equal weight that both wait all the time never differ by
more than ``2 * max(W_IN * longest prompt, W_OUT * tokens of a full batch)``.

Costs: O(log n) for each request, amortised, n the requests and tenants that wait; a token costs an addition.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from .ticket import Ticket

#: What a prompt token that must be computed costs, and what a token of an answer does.
W_IN, W_OUT = 1.0, 2.0
#: Tenants remembered though nothing of theirs waits or runs, because they are ahead of those that wait.
_MOST_IDLE = 1024
#: Entries of a heap that may be out of date before it is built anew.
_SLACK = 64


class _Tenant:
    __slots__ = ("counter", "heap", "name", "running", "waiting", "weight", "work")

    def __init__(self, name: str, weight: float, counter: float) -> None:
        self.name, self.weight, self.counter = name, weight, counter
        self.heap: list[tuple[float, float, int, Ticket]] = []
        self.waiting = self.running = 0
        self.work = 0.0  # what waits: prompts and expected answers, in the counters' unit


def work_of(ticket: Ticket) -> float:
    """What it is thought to cost, in the counters' unit."""
    return W_IN * ticket.uncached_tokens + W_OUT * ticket.ask.choices * ticket.expected_tokens


class FairQueue:
    """The requests of one class: fair between tenants, within a tenant the one that is due first, then the oldest.

    A tenant that comes back starts no lower than those that wait: it has saved up nothing (the paper's lift). That is
    why one without requests can be forgotten as soon as its counter is no longer above theirs.
    """

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._tenants: dict[str, _Tenant] = {}
        self._live: dict[int, float] = {}  # number of each that waits → what it is thought to cost
        self._order: list[tuple[float, int, str]] = []  # by counter; out of date where a counter has grown since
        self._idle: list[tuple[float, str]] = []
        self._serial = count()
        self._waiting_tenants = 0
        self._weights = 0.0  # of those that wait
        self._running = 0
        self._last: _Tenant | None = None
        self._level = 0.0  # where the least served stood at the last turn
        self._newcomers = 0.0  # where one starts of whom nothing is known
        self.work = 0.0
        self._prompts = self._choices = 0  # of those that wait

    def __len__(self) -> int:
        return len(self._live)

    def push(self, ticket: Ticket, due_s: float) -> None:
        """It waits from now on."""
        tenant = self._tenant(ticket.ask.tenant)
        if not tenant.waiting:
            self._lift(tenant)
        tenant.waiting += 1
        self._live[ticket.number] = work = work_of(ticket)
        tenant.work += work
        self.work += work
        self._prompts += ticket.ask.prompt_tokens
        self._choices += ticket.ask.choices
        heapq.heappush(tenant.heap, (due_s, ticket.arrived_s, ticket.number, ticket))

    def head(self) -> Ticket | None:
        """Whose turn it is; None: nobody waits."""
        tenant = self._least()
        if tenant is None:
            return None
        while tenant.heap[0][2] not in self._live:
            heapq.heappop(tenant.heap)
        return tenant.heap[0][3]

    def start(self, ticket: Ticket) -> None:
        """It was dispatched. Of its tenant one more is running."""
        self._run(self._tenants[ticket.ask.tenant])
        self.remove(ticket)

    def start_at_once(self, ticket: Ticket) -> None:
        """The same of one that has not waited, while nobody does."""
        tenant = self._tenants.get(ticket.ask.tenant) or self._tenant(ticket.ask.tenant)
        floor = self._floor() if self._last is not None else self._level
        if tenant.counter < floor:
            tenant.counter = floor
        self._run(tenant)

    def remove(self, ticket: Ticket) -> None:
        """It waits no longer."""
        work = self._live.pop(ticket.number)
        tenant = self._tenants[ticket.ask.tenant]
        tenant.waiting -= 1
        tenant.work -= work
        self.work -= work
        self._prompts -= ticket.ask.prompt_tokens
        self._choices -= ticket.ask.choices
        if len(tenant.heap) > 2 * tenant.waiting + _SLACK:
            tenant.heap = [entry for entry in tenant.heap if entry[2] in self._live]
            heapq.heapify(tenant.heap)
        if not tenant.waiting:
            tenant.heap.clear()
            tenant.work = 0.0
            self._waiting_tenants -= 1
            self._weights -= tenant.weight
            self._forget(tenant)

    def end(self, ticket: Ticket) -> None:
        """One that was dispatched runs no longer."""
        tenant = self._tenants[ticket.ask.tenant]
        tenant.running -= 1
        self._running -= 1
        if not tenant.running:
            self._forget(tenant)

    def charge(self, ticket: Ticket, cost: float) -> None:
        """So much was done for it; less than nothing: it had been charged too much."""
        tenant = self._tenants[ticket.ask.tenant]
        tenant.counter += cost / tenant.weight
        if cost < 0 and tenant.waiting:
            self._stand(tenant)

    def ahead_of(self, name: str | None) -> tuple[int, int]:
        """What is dispatched before one of that tenant's that is only coming now: prompt tokens, and answers.

        As much is done for each other tenant as for it, by weight, until all is done that it has waiting already. None:
        before one of a lower class, that is all.
        """
        if not self._live:
            return 0, 0
        tenant = None if name is None else self._tenants.get(name)
        if name is None:
            share = 1.0
        elif tenant is None or not tenant.waiting:
            share = 0.0
        else:
            share = min(1.0, tenant.work * self._weights / (tenant.weight * self.work)) if self.work else 1.0
        return round(share * self._prompts), round(share * self._choices)

    def counters(self) -> dict[str, float]:
        """How much was done for each tenant that is remembered, by weight."""
        return {name: tenant.counter for name, tenant in self._tenants.items()}

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(name, self._weight(name), self._newcomers)
        return tenant

    def _run(self, tenant: _Tenant) -> None:
        if self._level < tenant.counter:
            self._level = tenant.counter
        self._last = tenant
        tenant.running += 1
        self._running += 1

    def _floor(self) -> float:
        """Where one starts at least that comes back while nobody waits."""
        return max(self._level, self._last.counter) if self._last is not None else self._level

    def _lift(self, tenant: _Tenant) -> None:
        least = self._least()
        tenant.counter = max(tenant.counter, least.counter if least is not None else self._floor())
        self._waiting_tenants += 1
        self._weights += tenant.weight
        self._stand(tenant)

    def _stand(self, tenant: _Tenant) -> None:
        heapq.heappush(self._order, (tenant.counter, next(self._serial), tenant.name))
        if len(self._order) > 2 * self._waiting_tenants + _SLACK:
            standing = (each for each in self._tenants.values() if each.waiting)
            self._order = [(each.counter, next(self._serial), each.name) for each in standing]
            heapq.heapify(self._order)

    def _least(self) -> _Tenant | None:
        """Of those that wait, whose counter is least. A counter that grew since is put in its place first."""
        while self._order:
            counter, serial, name = self._order[0]
            tenant = self._tenants.get(name)
            if tenant is None or not tenant.waiting or counter > tenant.counter:
                heapq.heappop(self._order)
            elif counter < tenant.counter:
                heapq.heapreplace(self._order, (tenant.counter, serial, name))
            else:
                return tenant
        return None

    def _forget(self, tenant: _Tenant) -> None:
        """Forget those without requests whose counter says nothing any more: coming back they would be lifted."""
        if tenant.waiting or tenant.running:
            return
        if not self._live and not self._running:
            self._rest()
            return
        heapq.heappush(self._idle, (tenant.counter, tenant.name))
        while self._idle and (self._idle[0][0] <= self._level or len(self._idle) > _MOST_IDLE):
            counter, name = heapq.heappop(self._idle)
            found = self._tenants.get(name)
            if found is None or found.waiting or found.running or found.counter != counter:
                continue
            if counter > self._level:
                self._newcomers = max(self._newcomers, counter)
            del self._tenants[name]

    def _rest(self) -> None:
        """Nothing waits or runs: nobody has been kept waiting by another, all start anew."""
        self._tenants.clear()
        self._order.clear()
        self._idle.clear()
        self._last, self._level, self._newcomers = None, 0.0, 0.0
        self.work = self._weights = 0.0
