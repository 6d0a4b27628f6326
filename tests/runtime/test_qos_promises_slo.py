"""Attainment, burn rate and what is done about it, on a clock that the test moves."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_runtime.qos.policy import ClassPolicy, Enforcement, QosPolicy, SloPolicy
from aim_runtime.qos.slo import WINDOWS, Slo, Window
from virtual_engine import VirtualClock

POLICY = QosPolicy(
    version=1,
    classes={
        "high": ClassPolicy(slo=SloPolicy(ttft_ms=500, target=0.99)),
        "medium": ClassPolicy(slo=SloPolicy(ttft_ms=2000, target=0.9)),
    },
    enforcement=Enforcement(),
)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1e6)


def observe(slo: Slo, good: int, bad: int) -> None:
    for _ in range(good):
        slo.observe("high", 0.1, True)
    for _ in range(bad):
        slo.observe("high", 0.9, True)


def test_what_is_good(clock: VirtualClock):
    slo = Slo(POLICY, clock)
    for ttft_s, ok in ((0.5, True), (0.501, True), (0.1, False), (None, True), (None, False)):
        slo.observe("high", ttft_s, ok)
    assert slo.attainment("high", "5m") == 2 / 5
    assert slo.burn("high", "5m") == pytest.approx(60)


def test_no_data_is_no_attainment(clock: VirtualClock):
    slo = Slo(POLICY, clock)
    assert slo.attainment("high", "3d") is None
    assert slo.burn("high", "3d") is None
    slo.observe("low", 0.1, True)
    assert slo.attainment("low", "5m") is None  # nothing is promised to it
    observe(slo, 1, 0)
    clock.now_s += 305
    assert slo.attainment("high", "5m") is None
    assert slo.attainment("high", "1h") == 1


def test_windows_forget_in_their_time(clock: VirtualClock):
    slo = Slo(POLICY, clock)
    observe(slo, 0, 10)
    clock.now_s += 290
    observe(slo, 10, 0)
    assert {window: slo.attainment("high", window) for window in WINDOWS} == {"5m": 0.5, "1h": 0.5, "3d": 0.5}
    clock.now_s += 60
    assert {window: slo.attainment("high", window) for window in WINDOWS} == {"5m": 1.0, "1h": 0.5, "3d": 0.5}
    clock.now_s += 3600
    assert {window: slo.attainment("high", window) for window in WINDOWS} == {"5m": None, "1h": None, "3d": 0.5}
    clock.now_s += 3 * 86400
    assert slo.attainment("high", "3d") is None


def test_a_class_above_that_burns_holds_low_back_until_it_has_calmed_down(clock: VirtualClock):
    slo = Slo(POLICY, clock)
    observe(slo, 80, 20)  # burns at 20
    assert slo.throttled("low")
    assert not slo.throttled("medium")
    assert not slo.throttled("high")
    observe(slo, 100, 0)  # at 10: less than 14.4, and no less than half of it
    assert slo.throttled("low")
    observe(slo, 100, 0)
    assert not slo.throttled("low")
    observe(slo, 0, 10)  # at 9.7: on the way up it is not enough
    assert not slo.throttled("low")


def test_both_windows_must_burn(clock: VirtualClock):
    slo = Slo(POLICY, clock)
    observe(slo, 1000, 0)
    clock.now_s += 400
    observe(slo, 50, 50)
    assert (slo.burn("high", "5m") or 0) > 14.4 > (slo.burn("high", "1h") or 0)
    assert not slo.throttled("low")
    observe(slo, 0, 200)
    assert slo.throttled("low")
    clock.now_s += 600  # the hour still burns, the last minutes do not
    assert not slo.throttled("low")


def test_one_bad_request_is_no_alarm(clock: VirtualClock):
    slo = Slo(POLICY, clock)
    observe(slo, 0, 9)
    assert not slo.throttled("low")
    observe(slo, 0, 1)
    assert slo.throttled("low")


def test_without_enforcement_nothing_is_held_back(clock: VirtualClock):
    slo = Slo(POLICY.model_copy(update={"enforcement": None}), clock)
    observe(slo, 0, 100)
    assert not slo.throttled("low")


def test_a_clock_that_goes_backwards_loses_nothing(clock: VirtualClock):
    slo = Slo(POLICY, clock)
    observe(slo, 1, 0)
    clock.now_s -= 7200
    observe(slo, 0, 1)
    assert slo.attainment("high", "5m") == 0.5


def test_memory_does_not_grow(clock: VirtualClock):
    slo = Slo(POLICY, clock)
    sizes = []
    for number in range(20_000):
        clock.now_s += 60
        observe(slo, 1, number % 2)
        if number % 10_000 == 9_999:
            rings = [ring for each in slo._rings.values() for ring in each.values()]
            sizes.append(sum(sys.getsizeof(ring._good) + sys.getsizeof(ring._all) for ring in rings))
    assert sizes[0] == sizes[1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5000), st.booleans()), max_size=80), st.sampled_from(list(WINDOWS)))
def test_as_counted_by_hand(events: list[tuple[float, bool]], window: Window):
    clock = VirtualClock(1e6)
    slo = Slo(POLICY, clock)
    step_s, steps = WINDOWS[window]
    seen: list[tuple[int, bool]] = []
    for by_s, good in events:
        clock.now_s += by_s
        observe(slo, good, not good)
        seen.append((int(clock.now_s // step_s), good))
        kept = [each for at, each in seen if at > seen[-1][0] - steps]
        assert slo.attainment("high", window) == sum(kept) / len(kept)
