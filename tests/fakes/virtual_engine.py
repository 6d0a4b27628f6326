"""An engine that computes nothing, on a clock that nobody waits for: steps of a continuous batch, driven through the
scheduler as the real ones are. For tests of who is served when.

A step decodes one token of each running answer and computes up to ``chunk_tokens`` of the prompts; it takes
``step_s + sequence_s * answers + prompt_s * prompt tokens``. With ``parks`` the least urgent make way when more has
been dispatched than there are slots, and go on where they were.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from aim_runtime.qos.request import CLASSES, Ask, Rejected
from aim_runtime.qos.scheduler import Scheduler
from aim_runtime.qos.ticket import Ticket


class VirtualClock:
    """Seconds, as told."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@dataclass(slots=True)
class Arrival:
    """A request at its time. ``prompt_tokens``: as the engine counts them; the ask's are an estimate.
    ``answer_tokens``: of each answer. ``gone_s``: when its client leaves."""

    at_s: float
    ask: Ask
    prompt_tokens: int
    answer_tokens: int
    gone_s: float = math.inf


@dataclass(slots=True)
class Outcome:
    """What became of it. Times are the clock's; None: never."""

    arrival: Arrival
    ticket: Ticket | None = None
    refused: Rejected | None = None  # at its arrival
    first_s: float | None = None
    ended_s: float | None = None
    left: bool = False

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.arrival.at_s


@dataclass(slots=True)
class _Job:
    outcome: Outcome
    ticket: Ticket
    prompt_left: int
    tokens: int = 0  # of each answer

    @property
    def urgency(self) -> tuple[int, int]:
        return CLASSES.index(self.ticket.served_as), self.ticket.number


@dataclass
class VirtualEngine:
    """slots: answers in a step."""

    slots: int
    step_s: float = 0.02
    sequence_s: float = 0.0005
    prompt_s: float = 0.0002
    chunk_tokens: int = 512
    parks: bool = False
    jobs: list[_Job] = field(default_factory=list)

    def active(self) -> list[_Job]:
        """Those that have slots: all, or the most urgent."""
        chosen, free = [], self.slots
        for job in sorted(self.jobs, key=lambda job: job.urgency) if self.parks else self.jobs:
            if job.ticket.ask.choices <= free:
                chosen.append(job)
                free -= job.ticket.ask.choices
        return chosen

    def step(self) -> tuple[float, Callable[[], list[_Job]]]:
        """How long the next one takes, and what it does: the jobs that it got on with."""
        active, room, answers, prompts = self.active(), self.chunk_tokens, 0, list[tuple[_Job, int]]()
        for job in active:
            if job.prompt_left:
                part = min(room, job.prompt_left)
                room -= part
                prompts.append((job, part))
            else:
                answers += job.ticket.ask.choices
        seconds = self.step_s + self.sequence_s * answers + self.prompt_s * (self.chunk_tokens - room)

        def carry_out() -> list[_Job]:
            parts = dict((id(job), part) for job, part in prompts)
            for job in active:
                job.prompt_left -= parts.get(id(job), 0)
                if not job.prompt_left:
                    job.tokens += 1
            return active

        return seconds, carry_out


class Simulation:
    """Arrivals through a scheduler into an engine, until ``until_s``, or until all is done."""

    def __init__(self, scheduler: Scheduler, engine: VirtualEngine, clock: VirtualClock) -> None:
        self.scheduler, self.engine, self.clock = scheduler, engine, clock
        self.outcomes: dict[int, Outcome] = {}
        self.all: list[Outcome] = []
        self.late: list[Outcome] = []  # refused after they had waited
        self.check: Callable[[], None] = lambda: None  # asked after each decision

    def run(self, arrivals: Iterable[Arrival], until_s: float = math.inf) -> list[Outcome]:
        """One outcome for each arrival before ``until_s``."""
        coming = iter(sorted(arrivals, key=lambda each: each.at_s))
        arrival = next(coming, None)
        step: tuple[float, Callable[[], list[_Job]]] | None = None
        leaving: list[tuple[float, int]] = []
        while True:
            if step is None and self.engine.jobs:
                seconds, carry_out = self.engine.step()
                step = self.clock.now_s + seconds, carry_out
            wake = self.scheduler.next_wake_s()
            times = {
                "step": step[0] if step else math.inf,
                "arrival": arrival.at_s if arrival else math.inf,
                "leave": leaving[0][0] if leaving else math.inf,
                "wake": self.clock.now_s + max(wake, 1e-9) if wake is not None else math.inf,
            }
            event = min(times, key=lambda name: times[name])
            if times[event] >= until_s or times[event] == math.inf:
                return self.all
            self.clock.now_s = max(self.clock.now_s, times[event])
            if event == "step":
                assert step is not None
                self._stepped(step[1]())
                step = None
            elif event == "arrival":
                assert arrival is not None
                outcome = self._arrive(arrival)
                if outcome.ticket is not None and arrival.gone_s < math.inf:
                    heapq.heappush(leaving, (arrival.gone_s, outcome.ticket.number))
                arrival = next(coming, None)
            elif event == "leave":
                self._leave(heapq.heappop(leaving)[1])
            self._decide()

    def _arrive(self, arrival: Arrival) -> Outcome:
        outcome = Outcome(arrival)
        self.all.append(outcome)
        try:
            outcome.ticket = self.scheduler.offer(arrival.ask)
        except Rejected as refused:
            outcome.refused = refused
        else:
            self.outcomes[outcome.ticket.number] = outcome
        return outcome

    def _leave(self, number: int) -> None:
        outcome = self.outcomes[number]
        if outcome.ticket is not None and outcome.ticket.state != "ended":
            outcome.left = True
            self.engine.jobs = [job for job in self.engine.jobs if job.ticket is not outcome.ticket]
            self.scheduler.cancel(outcome.ticket)

    def _stepped(self, jobs: list[_Job]) -> None:
        for job in jobs:
            ticket = job.ticket
            if ticket.state != "running" or not job.tokens:
                continue
            if job.outcome.first_s is None:
                job.outcome.first_s = self.clock.now_s
                self.scheduler.counted(ticket, job.outcome.arrival.prompt_tokens, 0)
                self.scheduler.first_token(ticket)
            self.scheduler.progress(ticket, job.tokens * ticket.ask.choices)
            if job.tokens >= job.outcome.arrival.answer_tokens:
                job.outcome.ended_s = self.clock.now_s
                self.engine.jobs.remove(job)
                self.scheduler.done(ticket, ok=True)

    def _decide(self) -> None:
        for ticket in self.scheduler.ready():
            outcome = self.outcomes[ticket.number]
            self.engine.jobs.append(_Job(outcome, ticket, outcome.arrival.prompt_tokens))
        self._drop()
        while (blocked := self.scheduler.blocked()) is not None:
            victim = self.scheduler.victim(blocked)
            if victim is None:
                break
            self.engine.jobs = [job for job in self.engine.jobs if job.ticket is not victim]
            self.scheduler.requeue(victim)
            for ticket in self.scheduler.ready():
                outcome = self.outcomes[ticket.number]
                self.engine.jobs.append(_Job(outcome, ticket, outcome.arrival.prompt_tokens))
        self._drop()
        self.check()

    def _drop(self) -> None:
        for ticket in self.scheduler.expired():
            outcome = self.outcomes[ticket.number]
            outcome.ended_s = self.clock.now_s
            self.late.append(outcome)


def poisson(rng: random.Random, per_s: float, until_s: float) -> Iterator[float]:
    """Times of independent arrivals."""
    now_s = rng.expovariate(per_s)
    while now_s < until_s:
        yield now_s
        now_s += rng.expovariate(per_s)


def on_off(rng: random.Random, per_s: float, until_s: float, on_s: float = 4.0, off_s: float = 8.0) -> Iterator[float]:
    """Bursts: independent arrivals while it is on, none while it is off; ``per_s`` on the average."""
    start_s = 0.0
    while start_s < until_s:
        end_s = start_s + rng.expovariate(1 / on_s)
        rate = per_s * (on_s + off_s) / on_s
        yield from (start_s + at_s for at_s in poisson(rng, rate, min(end_s, until_s) - start_s))
        start_s = end_s + rng.expovariate(1 / off_s)


def lengths(rng: random.Random, median: float, spread: float, most: int) -> int:
    """Heavy-tailed, as prompts and answers of chats are: log-normal."""
    return max(1, min(most, round(median * math.exp(rng.gauss(0, spread)))))


def percentile(values: Iterable[float], share: float) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
