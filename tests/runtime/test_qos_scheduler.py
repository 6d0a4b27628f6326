"""The scheduler on a clock of its own: whatever comes, ends or leaves, what it promises holds."""

from __future__ import annotations

import random
import sys
from collections import Counter
from contextlib import suppress
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_kserve.identity.caller import QosClass
from aim_runtime.qos.fair import FairQueue
from aim_runtime.qos.ledger import reserves
from aim_runtime.qos.policy import QosPolicy
from aim_runtime.qos.request import CLASSES, Ask, Rejected
from aim_runtime.qos.scheduler import Scheduler
from aim_runtime.qos.ticket import Ticket
from aim_runtime.qos.ttft import to_prefill
from virtual_engine import Arrival, Simulation, VirtualClock, VirtualEngine


def policy(**parts: object) -> QosPolicy:
    return QosPolicy.model_validate({"version": 1, **parts})


NO_RESERVES = {name: {"reserve_slots": 0, "max_waiting": 100_000} for name in CLASSES}


def ask(qos_class: QosClass = "medium", tenant: str = "a", prompt: int = 10, **more: object) -> Ask:
    return Ask(tenant, qos_class, prompt, **{"max_tokens": 20, **more})  # type: ignore[arg-type]


class Bench:
    """A scheduler, and a clock that the test turns."""

    def __init__(self, rules: QosPolicy | None = None, **more: object) -> None:
        self.clock = VirtualClock()
        self.scheduler = Scheduler(rules or policy(), self.clock, **{"slots": 2, **more})  # type: ignore[arg-type]

    def offer(self, qos_class: QosClass = "medium", tenant: str = "a", **more: object) -> Ticket:
        return self.scheduler.offer(ask(qos_class, tenant, **more))  # type: ignore[arg-type]

    def ready(self) -> list[Ticket]:
        return self.scheduler.ready()

    def finish(self, ticket: Ticket, tokens: int = 20) -> None:
        self.scheduler.first_token(ticket)
        self.scheduler.progress(ticket, tokens)
        self.scheduler.done(ticket, ok=True)


# --- order --------------------------------------------------------------------------------------------------------


def test_the_more_urgent_class_goes_first() -> None:
    bench = Bench(slots=1)
    low, medium, high = bench.offer("low"), bench.offer("medium"), bench.offer("high")
    order = []
    while ready := bench.ready():
        order.extend(ready)
        bench.finish(ready[0])
    assert order == [high, medium, low]


def test_within_a_tenant_the_earliest_deadline_goes_first_then_the_oldest() -> None:
    bench = Bench(slots=1)
    whenever, late, soon = bench.offer(), bench.offer(ttft_slo_s=20.0), bench.offer(ttft_slo_s=5.0)
    second = bench.offer(ttft_slo_s=5.0)
    order = []
    while ready := bench.ready():
        order.extend(ready)
        bench.finish(ready[0])
    assert order == [soon, second, late, whenever]


def test_one_without_a_deadline_is_not_passed_for_ever() -> None:
    bench = Bench(policy(ageing_s=30.0), slots=1)
    whenever = bench.offer()
    bench.clock.now_s = 26.0
    bench.offer(ttft_slo_s=5.0)
    assert bench.ready() == [whenever]  # due at 30, the other at 31


def test_the_first_that_does_not_fit_is_not_overtaken() -> None:
    bench = Bench(slots=3, kv_tokens=None)
    running = [bench.offer() for _ in range(3)]
    assert bench.ready() == running
    large, small = bench.offer("high", choices=3), bench.offer("low")
    bench.finish(running[0])
    assert bench.ready() == []
    assert bench.scheduler.blocked() is large
    bench.finish(running[1])
    bench.finish(running[2])
    assert bench.ready() == [large]
    bench.finish(large, 60)
    assert bench.ready() == [small]


# --- capacity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 8, 64, 256])
def test_every_class_is_served_by_an_engine_of_any_size(slots: int) -> None:
    for name in CLASSES:
        bench = Bench(slots=slots, kv_tokens=100)
        ticket = bench.offer(name, prompt=70, choices=1)
        assert bench.ready() == [ticket]


def test_what_lower_classes_leave_free_is_high_s() -> None:
    bench = Bench(slots=8)
    low = [bench.offer("low") for _ in range(8)]
    assert bench.ready() == low[:6]
    medium = [bench.offer("medium") for _ in range(3)]
    assert bench.ready() == medium[:1]
    high = [bench.offer("high") for _ in range(2)]
    assert bench.ready() == high[:1]


def test_reserves_follow_the_slots_unless_the_policy_names_them() -> None:
    assert list(reserves(policy(), 1, False).values()) == [0, 0, 0]
    assert list(reserves(policy(), 16, False).values()) == [0, 2, 4]
    assert list(reserves(policy(), 16, True).values()) == [0, 0, 0]
    assert list(reserves(policy(classes={"low": {"reserve_slots": 1}}), 16, False).values()) == [0, 1, 1]
    assert list(reserves(policy(classes={"medium": {"reserve_slots": 7}}), 16, False).values()) == [0, 7, 7]


def test_a_policy_that_leaves_no_slot_for_low_still_serves_it_on_an_idle_engine() -> None:
    bench = Bench(policy(classes={"low": {"reserve_slots": 9}}), slots=4)
    first, second = bench.offer("low"), bench.offer("low")
    assert bench.ready() == [first]
    bench.finish(first)
    assert bench.ready() == [second]


def test_choices_are_taken_together_or_not_at_all() -> None:
    bench = Bench(policy(classes=NO_RESERVES), slots=4)
    three, two = bench.offer(choices=3), bench.offer(choices=2)
    assert bench.ready() == [three]
    assert bench.scheduler.ledger.slots_used == 3
    bench.finish(three, 60)
    assert bench.ready() == [two]


def test_kv_tokens_are_those_of_prompt_and_expected_answer_and_become_the_true_ones() -> None:
    bench = Bench(slots=8, kv_tokens=1000)
    ticket = bench.offer("high", prompt=400, max_tokens=100, choices=2)
    other = bench.offer("high", prompt=300, max_tokens=200)
    assert bench.ready() == [ticket]
    ledger = bench.scheduler.ledger
    assert ledger.kv_used == 400 + 2 * 100
    bench.scheduler.counted(ticket, prompt_tokens=410, cached_tokens=300)
    assert ledger.kv_used == 110 + 2 * 100
    assert bench.ready() == [other]
    bench.scheduler.cancel(ticket)
    bench.scheduler.cancel(other)
    assert (ledger.kv_used, ledger.slots_used) == (0, 0)


def test_an_answer_longer_than_thought_takes_more() -> None:
    bench = Bench(slots=8, kv_tokens=10_000)
    ticket = bench.offer("high", prompt=0, max_tokens=None)
    bench.ready()
    before = bench.scheduler.ledger.kv_used
    bench.scheduler.progress(ticket, before + 100)
    assert bench.scheduler.ledger.kv_used >= before + 100


def test_what_no_engine_of_this_size_can_hold_is_refused_at_once() -> None:
    bench = Bench(slots=4, kv_tokens=1000)
    with pytest.raises(Rejected, match="5 answers at once are asked for; the engine computes at most 4") as many:
        bench.offer(choices=5)
    with pytest.raises(Rejected, match="some 5000 tokens; the engine holds 1000: shorten the prompt") as long:
        bench.offer(prompt=5000)
    for refused in (many, long):
        assert (refused.value.reason, refused.value.retry_after_s) == ("too_large", None)
    assert not bench.scheduler.waiting()


def test_a_smaller_engine_drops_what_it_can_no_longer_hold_and_none_at_all_drops_nothing() -> None:
    bench = Bench(slots=4)
    running = bench.offer(choices=4)
    assert bench.ready() == [running]
    waiting, small = bench.offer(choices=3), bench.offer()
    bench.scheduler.resize(0, None)
    bench.finish(running, 80)
    assert (bench.ready(), bench.scheduler.expired()) == ([], [])
    bench.scheduler.resize(2, None)
    assert bench.ready() == [small]
    assert bench.scheduler.expired() == [waiting]
    assert waiting.rejected is not None
    assert waiting.rejected.reason == "too_large"


def test_no_more_wait_than_may_and_the_refusal_says_when_to_come_back() -> None:
    bench = Bench(policy(classes={"low": {"max_waiting": 1}, "high": {"max_waiting": 0}}), slots=1)
    running = bench.offer("high")  # nobody waits and there is room
    bench.ready()
    bench.offer("low")
    bench.clock.now_s = 9.0
    with pytest.raises(Rejected) as full:
        bench.offer("low")
    assert full.value.reason == "queue_full"
    assert full.value.retry_after_s is not None
    assert 4.5 <= full.value.retry_after_s <= 7
    with pytest.raises(Rejected):
        bench.offer("high")
    bench.offer("medium")
    bench.finish(running)
    assert sum(bench.scheduler.waiting().values()) == 2


# --- deadlines ----------------------------------------------------------------------------------------------------


def test_one_that_waits_is_dropped_at_its_deadline_and_not_later() -> None:
    bench = Bench(slots=1)
    bench.offer()
    bench.ready()
    ticket = bench.offer("high", ttft_slo_s=2.0)
    bench.ready()
    assert bench.scheduler.next_wake_s() == 2.0
    bench.clock.now_s = 2.0
    assert bench.ready() == []
    assert bench.scheduler.expired() == [ticket]
    assert ticket.rejected is not None
    assert ticket.rejected.reason == "deadline"
    assert "wanted within 2 s" in ticket.rejected.message
    assert not bench.scheduler.waiting()


def test_a_class_s_promise_is_the_deadline_of_those_that_name_none() -> None:
    bench = Bench(policy(classes={"high": {"slo": {"ttft_ms": 500.0}}}), slots=1)
    assert bench.offer("high").deadline_s == 0.5
    assert bench.offer("high", ttft_slo_s=3.0).deadline_s == 3.0
    assert bench.offer("low").deadline_s is None


# --- making way ---------------------------------------------------------------------------------------------------


def test_high_is_dispatched_onto_taken_slots_while_less_urgent_ones_can_be_paused() -> None:
    bench = Bench(slots=2, parks=True)
    low = [bench.offer("low"), bench.offer("low")]
    assert bench.ready() == low
    high = [bench.offer("high") for _ in range(3)]
    assert bench.ready() == high[:2]
    assert bench.scheduler.ledger.parked_slots == 2
    later = bench.offer("low")
    assert bench.ready() == []
    bench.finish(high[0])
    assert bench.ready() == high[2:]
    bench.finish(high[1])
    assert bench.ready() == []  # a slot for one of those paused
    assert bench.scheduler.ledger.parked_slots == 1
    medium = bench.offer("medium")
    assert bench.ready() == [medium]
    assert later.state == "waiting"


def test_equals_never_make_way_for_each_other() -> None:
    bench = Bench(slots=1, parks=True)
    first = bench.offer("high")
    assert bench.ready() == [first]
    bench.offer("high")
    assert bench.ready() == []


def test_the_policy_turns_pausing_off() -> None:
    bench = Bench(policy(preemption="off"), slots=1, parks=True)
    low = bench.offer("low")
    assert bench.ready() == [low]
    bench.offer("high")
    assert bench.ready() == []


def test_those_paused_go_on_while_they_have_less_than_their_floor() -> None:
    bench = Bench(policy(ageing_s=10.0, floor=0.1), slots=1, parks=True)
    low = bench.offer("low", prompt=0, max_tokens=1000)
    bench.ready()
    high = bench.offer("high")
    assert bench.ready() == [high]
    bench.finish(high)
    second = bench.offer("high")
    assert bench.ready() == []
    assert bench.scheduler.next_wake_s() == 0.05
    bench.scheduler.progress(low, 2)
    assert bench.ready() == []
    bench.scheduler.progress(low, 3)  # 3 tokens of an answer beside 10 of a prompt and 20 of an answer
    assert bench.ready() == [second]


def test_a_low_one_that_runs_ages_too_and_is_then_paused_for_high_alone() -> None:
    bench = Bench(policy(ageing_s=10.0, floor=0.0), slots=1, parks=True)
    low = bench.offer("low")
    assert bench.ready() == [low]
    bench.clock.now_s = 10.0
    bench.offer("medium")
    assert bench.ready() == []
    high = bench.offer("high")
    assert bench.ready() == [high]


def test_victims_are_the_last_come_of_the_least_urgent_one_at_a_time() -> None:
    bench = Bench(policy(replay=True, classes=NO_RESERVES), slots=4)
    medium, low, later, begun = bench.offer(), bench.offer("low"), bench.offer("low"), bench.offer("low")
    assert len(bench.ready()) == 4
    bench.scheduler.first_token(begun)
    high = bench.offer("high", choices=2)
    assert bench.ready() == []
    scheduler = bench.scheduler
    assert scheduler.victim(high) is later
    assert scheduler.victim(high) is None  # not before that one is queued again
    scheduler.requeue(later)
    assert bench.ready() == []
    assert scheduler.victim(high) is low
    scheduler.requeue(low)
    assert bench.ready() == [high]
    bench.finish(high, 40)
    assert bench.ready() == [low, later]  # in the order of their arrival
    assert medium.state == "running"


def test_nobody_is_aborted_in_vain() -> None:
    bench = Bench(policy(replay=True, classes=NO_RESERVES), slots=3)
    _, medium, _ = bench.offer("high"), bench.offer("medium"), bench.offer("high")
    bench.ready()
    large = bench.offer("high", choices=2)
    bench.ready()
    assert bench.scheduler.victim(large) is None  # with that one aborted there would still be no room
    assert bench.scheduler.victim(medium) is None
    bench.scheduler.cancel(large)
    small = bench.offer("high")
    bench.ready()
    assert bench.scheduler.victim(small) is medium


def test_one_is_replayed_twice_at_most() -> None:
    bench = Bench(policy(replay=True), slots=1)
    low = bench.offer("low", prompt=100)
    for _ in range(2):
        assert bench.ready() == [low]
        high = bench.offer("high")
        assert bench.ready() == []
        assert bench.scheduler.victim(high) is low
        bench.scheduler.requeue(low)
        assert bench.ready() == [high]
        bench.finish(high)
    assert bench.ready() == [low]
    high = bench.offer("high")
    bench.ready()
    assert bench.scheduler.victim(high) is None


def test_a_victim_s_tenant_does_not_pay_for_what_was_thrown_away() -> None:
    bench = Bench(policy(replay=True), slots=1)
    low = bench.offer("low", prompt=100)
    bench.ready()
    bench.offer("low")
    high = bench.offer("high")
    bench.ready()
    assert bench.scheduler.served("low")["a"] == 100.0
    assert bench.scheduler.victim(high) is low
    bench.scheduler.requeue(low)
    assert bench.scheduler.served("low")["a"] == 0.0


# --- ageing, floor, enforcement -----------------------------------------------------------------------------------


def test_a_low_one_that_has_waited_too_long_is_served_among_the_medium_ones() -> None:
    bench = Bench(policy(ageing_s=10.0, floor=0.0), slots=1)
    running = bench.offer("high")
    bench.ready()
    low = bench.offer("low")
    bench.clock.now_s = 9.0
    medium = bench.offer("medium", ttft_slo_s=60.0)
    bench.clock.now_s = 10.0
    bench.finish(running)
    assert bench.ready() == [low]
    assert low.served_as == "medium"
    assert (dict(bench.scheduler.waiting()), medium.state) == ({("medium", "a"): 1}, "waiting")


def test_those_below_get_their_floor_while_high_alone_could_fill_the_engine() -> None:
    bench = Bench(policy(ageing_s=10.0, floor=0.1, classes=NO_RESERVES), slots=1)
    for _ in range(100):
        bench.offer("low", "b")
    served = {"high": 0, "low": 0}
    for _ in range(400):
        bench.offer("high")
        (ticket,) = bench.ready()
        served[ticket.ask.qos_class] += 1
        bench.clock.now_s += 1.0
        bench.finish(ticket)
    assert 0.08 <= served["low"] / 400 <= 0.12


def test_what_was_begun_for_the_floor_counts_before_it_is_delivered() -> None:
    bench = Bench(policy(ageing_s=10.0, floor=0.02, classes=NO_RESERVES), slots=4)
    running = [bench.offer("high", max_tokens=400) for _ in range(4)]
    assert bench.ready() == running
    low = [bench.offer("low", "b", max_tokens=400) for _ in range(10)]
    for _ in range(40):
        for _ in range(4):
            bench.offer("high", max_tokens=400)
        for ticket in bench.scheduler.running():
            if ticket.ask.qos_class == "high":
                bench.finish(ticket, 400)
        bench.ready()
        bench.clock.now_s += 1.0
    assert 1 <= sum(ticket.state == "running" for ticket in low) <= 2


def test_those_held_back_do_not_age() -> None:
    bench = Bench(policy(enforcement={"share": 0.1}, ageing_s=10.0), slots=8, burns=lambda: True)
    running = bench.offer("high")
    bench.ready()
    low = bench.offer("low")
    bench.clock.now_s = 20.0
    assert bench.ready() == []
    assert low.level == "low"
    bench.finish(running)


def test_without_a_floor_high_alone_is_served() -> None:
    bench = Bench(policy(ageing_s=10.0, floor=0.0), slots=1)
    bench.offer("low")
    for _ in range(100):
        high = bench.offer("high")
        assert bench.ready() == [high]
        bench.clock.now_s += 1.0
        bench.finish(high)


def test_while_high_burns_its_budget_low_has_its_share_only() -> None:
    burns = True
    rules = policy(enforcement={"share": 0.25}, classes=NO_RESERVES)
    bench = Bench(rules, slots=8, burns=lambda: burns)
    low = [bench.offer("low") for _ in range(4)]
    medium = bench.offer("medium")
    assert bench.ready() == [medium, *low[:2]]
    assert bench.scheduler.next_wake_s() == 1.0
    burns = False
    assert bench.ready() == low[2:]


def test_low_is_refused_while_its_share_is_none() -> None:
    bench = Bench(policy(enforcement={"share": 0.0}), slots=8, burns=lambda: True)
    with pytest.raises(Rejected) as refused:
        bench.offer("low")
    assert refused.value.reason == "throttled"
    assert bench.ready() == []
    assert [bench.offer("medium")] == bench.ready()


# --- fairness -----------------------------------------------------------------------------------------------------


def backlogged(weights: dict[str, float], sizes: dict[str, int], seconds: float = 60.0) -> dict[str, float]:
    """Tokens, weighed as the counters do, that tenants were served who always wait."""
    clock = VirtualClock()
    rules = policy(tenants={name: {"weight": weight} for name, weight in weights.items()}, classes=NO_RESERVES)
    scheduler = Scheduler(rules, clock, slots=8)
    arrivals = [
        Arrival(0.0, Ask(name, "medium", size, size), size, size)
        for name, size in sizes.items()
        for _ in range(30_000 // size)
    ]
    worst = 0.0
    simulation = Simulation(scheduler, VirtualEngine(8, step_s=0.01), clock)

    def look() -> None:
        nonlocal worst
        served = scheduler.served("medium")
        worst = max(worst, max(served.values()) - min(served.values())) if len(served) == len(sizes) else worst

    simulation.check = look
    simulation.run(arrivals, until_s=seconds)
    assert all(scheduler.waiting()["medium", name] > 0 for name in sizes), "not backlogged to the end"
    largest = max(sizes.values())
    assert worst <= 2 * max(1.0 * largest, 2.0 * 8 * largest) / min(weights.values(), default=1.0)
    return {name: served * weights.get(name, 1.0) for name, served in scheduler.served("medium").items()}


def test_two_backlogged_tenants_differ_by_less_than_the_bound_and_share_alike() -> None:
    served = list(backlogged({}, {"small": 20, "large": 200}).values())
    jain = sum(served) ** 2 / (len(served) * sum(each**2 for each in served))
    assert jain >= 0.99


def test_weights_are_shares() -> None:
    served = backlogged({"gold": 3.0}, {"gold": 50, "tin": 50})
    assert 2.7 <= served["gold"] / served["tin"] <= 3.3


def test_one_who_was_idle_has_saved_up_nothing() -> None:
    bench = Bench(policy(classes=NO_RESERVES), slots=1)
    for _ in range(200):
        bench.offer(tenant="busy")
    for _ in range(100):
        (ticket,) = bench.ready()
        bench.finish(ticket)
    for _ in range(50):
        bench.offer(tenant="back")
    turns = []
    for _ in range(40):
        (ticket,) = bench.ready()
        turns.append(ticket.ask.tenant)
        bench.finish(ticket)
    assert 18 <= turns.count("back") <= 22


def test_one_who_left_ahead_of_the_others_comes_back_there_however_many_came_between() -> None:
    queue, numbers = FairQueue(lambda _: 1.0), count(1)

    def push(tenant: str) -> Ticket:
        ticket = Ticket(next(numbers), ask(tenant=tenant), 0.0, "medium")
        queue.push(ticket, 0.0)
        return ticket

    steady = [push("steady") for _ in range(3)]
    for at in range(3000):
        passing = push(f"passing-{at}")
        queue.start(passing)
        queue.charge(passing, 50_000)
        queue.end(passing)
    assert len(queue.counters()) < 1100
    push("passing-5")  # long forgotten
    queue.start(steady[0])
    queue.charge(steady[0], 40_000)
    assert queue.head() is steady[1]


def test_ten_thousand_tenants_are_forgotten_once_they_are_served() -> None:
    bench = Bench(policy(classes=NO_RESERVES), slots=64)
    keeps = bench.offer(tenant="keeps")
    for at in range(10_000):
        bench.offer(tenant=f"t{at}", prompt=at % 7)
    while ready := bench.ready():
        for ticket in ready:
            if ticket is not keeps:
                bench.finish(ticket, 1 + ticket.number % 20)
    assert len(bench.scheduler.served("medium")) <= 1100
    bench.finish(keeps)
    assert not bench.scheduler.served("medium")


# --- whatever happens ---------------------------------------------------------------------------------------------

_ASKS = st.builds(
    Ask,
    tenant=st.sampled_from("abc"),
    qos_class=st.sampled_from(CLASSES),
    prompt_tokens=st.integers(0, 40),
    max_tokens=st.sampled_from([1, 5, 20, None]),
    choices=st.sampled_from([1, 1, 1, 2, 4]),
    ttft_slo_s=st.one_of(st.none(), st.floats(0.1, 5.0)),
)
_STEPS = st.one_of(
    st.tuples(st.just("offer"), _ASKS),
    st.tuples(st.just("offer"), _ASKS),
    st.tuples(st.just("offer"), _ASKS),
    st.tuples(st.just("token"), st.integers(0, 50)),
    st.tuples(st.just("done"), st.integers(0, 50)),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("counted"), st.integers(0, 50)),
    st.tuples(st.just("victim"), st.just(0)),
    st.tuples(st.just("wait"), st.floats(0.01, 3.0)),
)


class Watched:
    """Drives a scheduler, and looks at every promise after every step."""

    def __init__(self, slots: int, kv_tokens: int | None, parks: bool, replay: bool) -> None:
        self.clock = VirtualClock()
        self.kv_tokens, self.slots, self.parks = kv_tokens, slots, parks
        rules = policy(replay=replay, ageing_s=4.0, classes={"high": {"max_waiting": 5}})
        self.reserves = reserves(rules, slots, parks)
        self.scheduler = Scheduler(rules, self.clock, slots=slots, kv_tokens=kv_tokens, parks=parks)
        self.enter = self.scheduler.offer
        self.tickets: list[Ticket] = []
        self.dispatched: list[int] = []
        self.dropped: list[int] = []
        self.replayed: list[int] = []

    def step(self, what: str, value: object) -> None:
        if what == "offer":
            assert isinstance(value, Ask)
            with suppress(Rejected):
                self.tickets.append(self.enter(value))
        elif what == "wait":
            assert isinstance(value, float)
            self.clock.now_s += value
        elif what == "victim":
            self.make_way()
        else:
            assert isinstance(value, int)
            self.report(what, value)
        self.decide()

    def report(self, what: str, at: int) -> None:
        alive = [ticket for ticket in self.tickets if ticket.state != "ended"]
        if not alive:
            return
        ticket = alive[at % len(alive)]
        if what == "cancel":
            self.scheduler.cancel(ticket)
        elif ticket.state == "running" and what == "done":
            self.scheduler.done(ticket, ok=True)
        elif ticket.state == "running" and what == "counted":
            self.scheduler.counted(ticket, ticket.ask.prompt_tokens + at % 3, at % 5)
        elif ticket.state == "running":
            self.scheduler.first_token(ticket)
            self.scheduler.progress(ticket, ticket.delivered + at)

    def make_way(self) -> None:
        blocked = self.scheduler.blocked()
        victim = self.scheduler.victim(blocked) if blocked is not None else None
        if victim is not None and blocked is not None:
            assert CLASSES.index(victim.served_as) > CLASSES.index(blocked.level)
            assert victim.first_token_s is None
            self.replayed.append(victim.number)
            self.scheduler.requeue(victim)

    def decide(self) -> None:
        used, kv = self.scheduler.ledger.slots_used, self.scheduler.ledger.kv_used
        for ticket in self.scheduler.ready():
            self.dispatched.append(ticket.number)
            assert ticket.deadline_s is None or self.clock.now_s < ticket.deadline_s
            alone = used == 0
            used += ticket.ask.choices
            kv += ticket.uncached_tokens + ticket.ask.choices * ticket.expected_tokens
            if not self.parks:
                assert used <= self.slots
            # What is paused is put aside with its part of the cache.
            if self.kv_tokens is not None and not alone and not self.scheduler.ledger.parked_slots:
                assert kv <= self.kv_tokens
        self.dropped.extend(ticket.number for ticket in self.scheduler.expired())
        self.look()

    def look(self) -> None:
        ledger, running = self.scheduler.ledger, self.scheduler.running()
        assert ledger.slots_used == sum(ticket.ask.choices for ticket in running)
        if ledger.parked_slots:  # never of the most urgent class
            most = min(running, key=lambda each: CLASSES.index(each.served_as)).served_as
            assert sum(each.ask.choices for each in running if each.served_as == most) <= self.slots
        assert ledger.slots_used <= 2 * self.slots
        waiting = [ticket for ticket in self.tickets if ticket.state == "waiting"]
        assert sum(self.scheduler.waiting().values()) == len(waiting)
        if waiting:
            assert running, "somebody waits and nobody runs"
            self.no_idle_slot(waiting)
        starts, replays = Counter(self.dispatched), Counter(self.replayed)
        assert all(times <= 1 + replays[number] for number, times in starts.items())

    def no_idle_slot(self, waiting: list[Ticket]) -> None:
        """The first in order has no room: none waits that could be served."""
        blocked = self.scheduler.blocked()
        assert blocked in waiting
        assert not any(CLASSES.index(each.level) < CLASSES.index(blocked.level) for each in waiting) or (
            self.clock.now_s >= blocked.arrived_s + 4.0
        )
        ledger = self.scheduler.ledger
        needed = blocked.uncached_tokens + blocked.ask.choices * blocked.expected_tokens
        no_slots = ledger.slots_used + blocked.ask.choices > self.slots - self.reserves[blocked.level]
        no_tokens = self.kv_tokens is not None and ledger.kv_used + needed > 0.9 * self.kv_tokens
        assert no_slots or no_tokens

    def seen(self) -> object:
        """All that a caller can see."""
        ledger = self.scheduler.ledger
        tickets = [(each.number, each.state, each.served_as, each.level, each.to_prefill) for each in self.tickets]
        served = [self.scheduler.served(level) for level in CLASSES]
        running = [ticket.number for ticket in self.scheduler.running()]
        return tickets, running, ledger.slots_used, ledger.kv_used, served, self.scheduler.waiting()


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(_STEPS, min_size=5, max_size=30),
    slots=st.sampled_from([1, 2, 4, 9]),
    kv_tokens=st.sampled_from([None, 60, 200]),
    parks=st.booleans(),
)
def test_what_is_begun_at_once_stands_as_if_it_had_been_offered_and_was_ready(
    steps: list[tuple[str, object]], slots: int, kv_tokens: int | None, parks: bool
) -> None:
    at_once, in_turn = (Watched(slots, kv_tokens, parks, replay=True) for _ in range(2))
    at_once.enter = at_once.scheduler.begin
    for what, value in steps:
        # Less than 30 s in all: then predictions that nothing has checked begin to count for less.
        value = value / 4 if isinstance(value, float) else value
        at_once.step(what, value)
        in_turn.step(what, value)
        assert at_once.seen() == in_turn.seen()


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(0, 20), st.integers(0, 40), st.booleans()),
        max_size=30,
    )
)
def test_what_ends_is_settled_as_if_each_thing_had_been_told(ends: list[tuple[int, int, int, int, bool]]) -> None:
    at_once, by_turns = Bench(slots=3, kv_tokens=5000), Bench(slots=3, kv_tokens=5000)
    running: list[tuple[Ticket, Ticket]] = []
    for at, (which, prompt, cached, tokens, ok) in enumerate(ends):
        asked = ask(tenant="abc"[at % 3])
        running.append((at_once.scheduler.begin(asked), by_turns.scheduler.begin(asked)))
        if len(running) == 3:
            one, other = running.pop(which % 3)
            at_once.scheduler.settle(one, prompt, cached, tokens, ok=ok)
            if prompt:
                by_turns.scheduler.counted(other, prompt, cached)
            by_turns.scheduler.progress(other, tokens)
            by_turns.scheduler.done(other, ok)
            assert (one.state, one.delivered) == (other.state, other.delivered) == ("ended", tokens)
        seen = [
            (each.ledger.slots_used, each.ledger.kv_used, each.served("medium"), each.lengths.moments("medium"))
            for each in (at_once.scheduler, by_turns.scheduler)
        ]
        assert seen[0] == seen[1]


def test_what_others_have_to_compute_before_is_known_without_looking_through_them() -> None:
    bench = Bench(policy(classes=NO_RESERVES), slots=20)
    choose = random.Random(4)
    running: list[Ticket] = []
    for _ in range(300):
        what = choose.random()
        if what < 0.4 and len(running) < 20:
            before = to_prefill(running)
            running.append(bench.scheduler.begin(ask(prompt=choose.randrange(1, 50))))
            assert running[-1].state == "running"
            assert running[-1].to_prefill == before
        elif running and what < 0.6:
            bench.scheduler.counted(choose.choice(running), choose.randrange(1, 60), choose.randrange(20))
        elif running and what < 0.8:
            bench.scheduler.first_token(choose.choice(running))
        elif running:
            ticket = running.pop(choose.randrange(len(running)))
            bench.scheduler.settle(ticket, choose.randrange(60), 0, 20, ok=True)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(_STEPS, min_size=5, max_size=60),
    slots=st.sampled_from([1, 2, 4, 9]),
    kv_tokens=st.sampled_from([None, 60, 200]),
    parks=st.booleans(),
    replay=st.booleans(),
)
def test_whatever_comes_ends_or_leaves(
    steps: list[tuple[str, object]], slots: int, kv_tokens: int | None, parks: bool, replay: bool
) -> None:
    watched = Watched(slots, kv_tokens, parks, replay)
    for what, value in steps:
        watched.step(what, value)
    for _ in range(1000):
        alive = [ticket for ticket in watched.tickets if ticket.state != "ended"]
        if not alive:
            break
        for ticket in alive:
            if ticket.state == "running":
                watched.scheduler.done(ticket, ok=True)
        watched.decide()
    assert {ticket.state for ticket in watched.tickets} <= {"ended"}
    ledger = watched.scheduler.ledger
    assert (ledger.slots_used, ledger.kv_used, ledger.parked_slots) == (0, 0, 0)
    assert not watched.scheduler.waiting()
    # Each was dispatched, dropped or cancelled: none lost, none both.
    assert not set(watched.dispatched) & set(watched.dropped) - set(watched.replayed)


def test_the_work_of_a_decision_does_not_grow_with_those_that_wait() -> None:
    def operations(waiting: int) -> int:
        rng = random.Random(7)
        bench = Bench(policy(classes=NO_RESERVES), slots=4, kv_tokens=100_000)
        for at in range(waiting):
            bench.offer(
                rng.choice(CLASSES), f"t{at % 100}", prompt=rng.randrange(50), ttft_slo_s=rng.choice([None, 1e6])
            )
        count = 0

        def trace(frame: object, event: str, arg: object) -> object:
            nonlocal count
            count += event == "line"
            return trace

        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            while ready := bench.ready():
                for ticket in ready:
                    bench.finish(ticket)
        finally:
            sys.settrace(None)
        return count

    assert operations(2000) <= 1.3 * 4 * operations(500)


def test_a_flood_of_refusals_costs_one_prediction_in_fifty_milliseconds() -> None:
    bench = Bench(slots=1)
    predictions = 0
    predict = bench.scheduler.ttft.predict

    def counting(*args: object) -> object:
        nonlocal predictions
        predictions += 1
        return predict(*args)  # type: ignore[arg-type]

    bench.scheduler.ttft.predict = counting  # type: ignore[assignment, method-assign]
    bench.offer("low", max_tokens=None)
    bench.ready()
    before = predictions
    for _ in range(100):
        bench.clock.now_s += 0.001
        with pytest.raises(Rejected, match=r"wanted within 0\.001 s") as refused:
            bench.offer("low", ttft_slo_s=0.001)
        assert refused.value.reason == "deadline"
    assert predictions - before <= 3
    assert bench.offer("low", "another tenant", ttft_slo_s=60.0).state == "waiting"
