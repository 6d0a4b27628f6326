"""Token buckets, on a clock that the test moves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_runtime.qos.buckets import Buckets
from aim_runtime.qos.policy import Limit
from aim_runtime.qos.request import Rejected
from virtual_engine import VirtualClock


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1e6)


def ask(buckets: Buckets, tenant: str = "a", tokens: int = 1, qos_class: str = "low", model: str = "m") -> float:
    return buckets.take(model, qos_class, tenant, tokens)


def test_without_limits_everything_is_taken(clock: VirtualClock):
    assert ask(Buckets([], clock), tokens=10**9) == 0


def test_a_burst_then_the_rate(clock: VirtualClock):
    buckets = Buckets([Limit(requests_per_minute=60, burst_s=3)], clock)
    assert [ask(buckets) for _ in range(5)] == [0, 0, 0, 1, 1]
    clock.now_s += 0.5
    assert ask(buckets) == 0.5
    clock.now_s += 0.5
    assert ask(buckets) == 0
    assert ask(buckets) == 1


def test_a_limit_without_a_burst_holds_a_minute(clock: VirtualClock):
    buckets = Buckets([Limit(tokens_per_minute=600)], clock)
    assert ask(buckets, tokens=600) == 0
    assert ask(buckets, tokens=100) == 10


def test_all_limits_that_hold_or_none_is_charged(clock: VirtualClock):
    buckets = Buckets([Limit(requests_per_minute=2), Limit(qos_class="low", tokens_per_minute=60)], clock)
    assert ask(buckets, tokens=60) == 0
    assert ask(buckets, tokens=60) == 60  # and the other limit was not charged for it
    clock.now_s += 1
    assert ask(buckets, tokens=1) == 0
    assert ask(buckets, tokens=1) == pytest.approx(29)
    assert [ask(buckets, tokens=60, qos_class="high") for _ in range(3)] == [0, 0, 30]


def test_each_model_class_and_tenant_has_its_own(clock: VirtualClock):
    buckets = Buckets([Limit(requests_per_minute=1), Limit(model="m", tenant="a", requests_per_minute=0.5)], clock)
    assert [ask(buckets, "b"), ask(buckets, "b"), ask(buckets, "c")] == [0, 60, 0]
    assert [ask(buckets, "b", qos_class="high"), ask(buckets, "b", model="other")] == [0, 0]
    assert [ask(buckets, "a"), ask(buckets, "a")] == [0, 120]
    assert [ask(buckets, "a", model="other"), ask(buckets, "a", model="other")] == [0, 60]


def test_one_request_is_never_larger_than_a_burst_of_requests(clock: VirtualClock):
    buckets = Buckets([Limit(requests_per_minute=1, burst_s=5)], clock)
    assert [ask(buckets), ask(buckets)] == [0, 60]


def test_a_request_larger_than_the_burst_is_refused_for_good(clock: VirtualClock):
    buckets = Buckets([Limit(qos_class="low", tokens_per_minute=6000, burst_s=5)], clock)
    with pytest.raises(Rejected, match=r"700 tokens .*200 more than class low may have at once \(500\)") as refused:
        ask(buckets, tokens=700)
    assert refused.value.retry_after_s is None
    assert ask(buckets, tokens=500) == 0  # nothing of it was charged


def test_what_was_not_used_comes_back(clock: VirtualClock):
    buckets = Buckets([Limit(tokens_per_minute=60)], clock)
    assert ask(buckets, tokens=60) == 0
    buckets.settle("m", "low", "a", charged=60, used=20)  # its client left after a few tokens
    assert ask(buckets, tokens=40) == 0
    assert ask(buckets, tokens=1) == 1


def test_what_was_used_beyond_the_charge_is_owed(clock: VirtualClock):
    buckets = Buckets([Limit(tokens_per_minute=60)], clock)
    assert ask(buckets, tokens=60) == 0
    buckets.settle("m", "low", "a", charged=60, used=90)
    assert ask(buckets, tokens=1) == 31


def test_settling_never_fills_beyond_the_burst(clock: VirtualClock):
    buckets = Buckets([Limit(tokens_per_minute=60)], clock)
    ask(buckets, tokens=60)
    clock.now_s += 3600
    buckets.settle("m", "low", "a", charged=60, used=0)
    assert ask(buckets, tokens=60) == 0
    assert ask(buckets, tokens=1) == 1


def test_what_is_refused_for_another_reason_is_given_back_whole(clock: VirtualClock):
    buckets = Buckets([Limit(requests_per_minute=1, tokens_per_minute=60)], clock)
    assert ask(buckets, tokens=60) == 0
    buckets.give_back("m", "low", "a", 60)
    assert ask(buckets, tokens=60) == 0


def test_a_clock_that_goes_backwards_takes_and_gives_nothing(clock: VirtualClock):
    buckets = Buckets([Limit(requests_per_minute=60, burst_s=1)], clock)
    assert ask(buckets) == 0
    clock.now_s -= 3600
    assert ask(buckets) == 1
    clock.now_s += 1
    assert ask(buckets) == 0


def test_the_number_of_buckets_is_bounded_and_strangers_share_one(clock: VirtualClock):
    buckets = Buckets([Limit(requests_per_minute=1)], clock, most_tenants=8)
    assert [ask(buckets, f"t{number}") for number in range(12)] == [0] * 9 + [60] * 3
    assert len(buckets) == 8
    assert ask(buckets, "t0") == 60  # nobody's debt was forgotten for it
    clock.now_s += 60
    for number in range(10_000):
        clock.now_s += 60
        assert ask(buckets, f"new{number}") == 0
    assert len(buckets) == 8


@st.composite
def histories(draw: st.DrawFn) -> tuple[Limit, list[tuple[float, int, str]]]:
    """A limit whose burst is 1000 tokens, and (seconds, tokens, tenant) of the requests."""
    rate = draw(st.floats(1, 1e6))
    requests = draw(st.none() | st.floats(1, 1e5))
    limit = Limit(tokens_per_minute=rate, requests_per_minute=requests, burst_s=60_000.001 / rate)
    steps = st.tuples(st.floats(-5, 100), st.integers(0, 1000), st.sampled_from("ab"))
    return limit, draw(st.lists(steps, max_size=60))


@settings(deadline=None)
@given(histories())
def test_never_more_than_the_burst_and_what_came_in_since(history: tuple[Limit, list[tuple[float, int, str]]]):
    limit, steps = history
    clock = VirtualClock(1e6)
    buckets = Buckets([limit], clock)
    passed_s, taken, requests = 0.0, {"a": 0, "b": 0}, {"a": 0, "b": 0}
    for by_s, tokens, tenant in steps:
        clock.now_s += by_s
        passed_s += max(0.0, by_s)
        if ask(buckets, tenant, tokens) == 0:
            taken[tenant] += tokens
            requests[tenant] += 1
        rounded_s = passed_s + 1e-5 * len(steps)
        assert taken[tenant] <= 1001 + rounded_s * (limit.tokens_per_minute or 0) / 60
        if limit.requests_per_minute:
            burst = max(1, limit.requests_per_minute / 60 * limit.burst_s)
            assert requests[tenant] <= burst + 1e-3 + rounded_s * limit.requests_per_minute / 60


@settings(deadline=None)
@given(histories())
def test_a_wait_is_exact(history: tuple[Limit, list[tuple[float, int, str]]]):
    limit, steps = history
    clock = VirtualClock(1e6)
    buckets = Buckets([limit], clock)
    for by_s, tokens, tenant in steps:
        clock.now_s += abs(by_s)
        wait_s = ask(buckets, tenant, tokens)
        if wait_s > 1e-3:
            clock.now_s += wait_s - 1e-3
            assert ask(buckets, tenant, tokens) == pytest.approx(1e-3, rel=0.01)
        if wait_s:
            clock.now_s += min(wait_s, 1e-3)
            assert ask(buckets, tenant, tokens) == 0
