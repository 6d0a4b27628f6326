"""Estimates, circuit breakers and bounded calls, over clocks that tests move."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable

import pytest

from aim_guardrail.detectors.base import Asked, Misconfigured, Passage
from aim_guardrail.detectors.threads import ABANDONED, Busy, Threads
from aim_guardrail.pipeline.bounded import MOST_ABANDONED, MOST_AT_ONCE, Bounded, NotAsked
from aim_guardrail.pipeline.breaker import FAILURES, LONGEST_WAIT_S, WAIT_S, Breaker
from aim_guardrail.pipeline.budget import LEAST_ANSWERS, PROBE_EVERY_S, Estimate
from scripted_detectors import Scripted, ScriptedOptions


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# --- estimates --------------------------------------------------------------------------------------------------


def learnt(clock: Clock, seconds: float, chars: int = 100) -> Estimate:
    estimate = Estimate(clock)
    for _ in range(LEAST_ANSWERS):
        assert estimate.allows(chars, 1e9)
        estimate.answered(chars, seconds, 1e9)
    return estimate


def test_nothing_is_expected_of_a_detector_that_has_hardly_answered(clock: Clock):
    estimate = Estimate(clock)
    for _ in range(LEAST_ANSWERS - 1):
        estimate.answered(100, 5, 9)
        assert estimate.expected_s(100) is None
        assert estimate.allows(100, 0.001)
    estimate.answered(100, 5, 9)
    assert estimate.expected_s(100) == pytest.approx(5)


def test_what_will_not_fit_is_not_asked_and_what_fits_is(clock: Clock):
    estimate = learnt(clock, 0.2)
    assert not estimate.allows(100, 0.1)
    assert estimate.allows(100, 0.3)
    assert not estimate.allows(100, 0.0)


def test_long_texts_say_nothing_of_short_ones(clock: Clock):
    estimate = learnt(clock, 5, chars=100_000)
    assert not estimate.allows(90_000, 0.1)
    assert estimate.allows(100, 0.1)
    assert estimate.expected_s(100) is None


def test_a_slow_phase_shuts_no_detector_out_for_ever(clock: Clock):
    estimate = learnt(clock, 5)
    assert not estimate.allows(100, 0.1)
    clock.now += PROBE_EVERY_S
    assert estimate.allows(100, 0.1)  # the probe
    assert not estimate.allows(100, 0.1)  # one at a time
    estimate.answered(100, 0.01, 0.1)
    for _ in range(3 * LEAST_ANSWERS):
        assert estimate.allows(100, 0.1)
        estimate.answered(100, 0.01, 0.1)
    assert estimate.expected_s(100) == pytest.approx(0.01)


def test_a_probe_that_is_late_keeps_it_out(clock: Clock):
    estimate = learnt(clock, 5)
    clock.now += PROBE_EVERY_S
    assert estimate.allows(100, 0.1)
    estimate.timed_out(100, 0.1)
    assert not estimate.allows(100, 0.1)
    assert estimate.expected_s(100) == pytest.approx(5)  # "later than 0.1 s" is no news


def test_timeouts_alone_come_to_more_than_was_waited(clock: Clock):
    estimate = Estimate(clock)
    for _ in range(LEAST_ANSWERS):
        assert estimate.allows(100, 0.1)
        estimate.timed_out(100, 0.1)
    assert not estimate.allows(100, 0.1)


# --- breakers ---------------------------------------------------------------------------------------------------


def broken(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        assert breaker.allows()
        breaker.begin()
        breaker.failed()
    return breaker


def test_it_opens_after_failures_in_a_row_only(clock: Clock):
    breaker = Breaker(clock)
    for _ in range(3 * FAILURES):
        breaker.begin()
        breaker.failed()
        breaker.begin()
        breaker.succeeded()
    assert breaker.allows()
    assert not broken(clock).allows()


def test_one_call_tells_whether_it_closes(clock: Clock):
    breaker = broken(clock)
    clock.now += WAIT_S
    assert breaker.allows()
    breaker.begin()
    assert not breaker.allows()
    breaker.succeeded()
    assert breaker.allows()
    assert not breaker.is_open


def test_it_waits_longer_each_time_and_not_for_ever(clock: Clock):
    breaker, waits = broken(clock), []
    for _ in range(8):
        began = clock.now
        while not breaker.allows():
            clock.now += 0.5
        waits.append(clock.now - began)
        breaker.begin()
        breaker.failed()
    assert waits == [1, 2, 4, 8, 16, LONGEST_WAIT_S, LONGEST_WAIT_S, LONGEST_WAIT_S]


def test_a_probe_that_nobody_waited_for_is_followed_by_another(clock: Clock):
    breaker = broken(clock)
    clock.now += WAIT_S
    breaker.begin()
    breaker.gave_up()
    assert breaker.allows()


def test_late_failures_of_calls_from_before_do_not_prolong_it(clock: Clock):
    breaker = broken(clock)
    until = clock.now + WAIT_S
    clock.now += WAIT_S / 2
    breaker.failed()
    clock.now = until
    assert breaker.allows()


# --- calls ------------------------------------------------------------------------------------------------------


def bounded(cost: str = "model") -> tuple[Bounded, Scripted]:
    detector = Scripted(ScriptedOptions(name="d", cost=cost))  # type: ignore[arg-type]
    return Bounded(detector, "d"), detector


async def ask(asked: Bounded, text: str, seconds: float = 5) -> object:
    return await asked.ask([Passage(text, "prompt")], Asked(time.monotonic() + seconds))


async def test_no_call_outlasts_its_deadline_even_one_that_does_not_end_when_cancelled():
    detector, script = bounded()
    for order in ("d=sleep:30", "d=stuck:1"):
        with pytest.raises(TimeoutError):
            await ask(detector, order, 0.05)
    before = ABANDONED.count
    await until(lambda: ABANDONED.count == before + 1)
    assert ("cancelled", len("d=sleep:30")) in script.did
    await until(lambda: ABANDONED.count == before)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  the count has no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("alone", [True, False])
async def test_of_many_passages_a_detector_is_asked_about_some_at_a_time_where_each_stands_alone(alone: bool):
    script = Scripted(ScriptedOptions(name="d", cacheable=alone))
    texts = ["d=bad" if at % 700 == 0 else "fine" for at in range(3 * MOST_AT_ONCE + 5)]
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(count())
    passages = [Passage(text, "prompt") for text in texts]
    found = await Bounded(script, "d").ask(passages, Asked(time.monotonic() + 60))
    counting.cancel()
    assert [bool(each) for each in found] == [text == "d=bad" for text in texts]
    assert len([did for did, _ in script.did if did == "asked"]) == (4 if alone else 1)
    assert turns >= 4  # others had theirs between


async def test_calls_that_run_on_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("aim_guardrail.pipeline.bounded.GRACE_S", 0)
    detector, _ = bounded()
    asks = [ask(detector, "d=stuck:0.5", 0.05) for _ in range(MOST_ABANDONED)]
    assert {type(end) for end in await asyncio.gather(*asks, return_exceptions=True)} == {TimeoutError}
    await asyncio.sleep(0.01)
    with pytest.raises(Busy):
        await ask(detector, "d=bad")
    await asyncio.sleep(0.6)
    assert await ask(detector, "d=bad")


async def test_many_at_once_that_end_when_they_are_cancelled_are_no_bound():
    detector, _ = bounded()
    tasks = [asyncio.ensure_future(ask(detector, "d=sleep:30")) for _ in range(5 * MOST_ABANDONED)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    assert await ask(detector, "d=bad")
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_answer_that_is_none_is_an_error():
    detector, _ = bounded()
    with pytest.raises(ValueError, match="outside its passage"):
        await ask(detector, "d=garbage")


async def test_a_remote_that_keeps_failing_is_left_alone():
    detector, script = bounded("remote")
    for _ in range(FAILURES):
        with pytest.raises(RuntimeError):
            await ask(detector, "d=fail")
    with pytest.raises(NotAsked, match="breaker"):
        await ask(detector, "d=bad")
    assert len([1 for what, _ in script.did if what == "asked"]) == FAILURES


async def test_one_that_computes_here_has_no_breaker_and_no_misconfiguration_opens_one():
    here, _ = bounded()
    for _ in range(2 * FAILURES):
        with pytest.raises(RuntimeError):
            await ask(here, "d=fail")
    there, _ = bounded("remote")
    for _ in range(2 * FAILURES):
        with pytest.raises(Misconfigured):
            await ask(there, "d=denied")


async def test_what_is_slow_of_late_is_not_asked_where_too_little_is_left():
    detector, script = bounded()
    for _ in range(LEAST_ANSWERS):
        await ask(detector, "d=sleep:0.05")
    with pytest.raises(NotAsked, match="budget"):
        await ask(detector, "d=sleep:0.05", 0.02)
    assert len([1 for what, _ in script.did if what == "asked"]) == LEAST_ANSWERS


# --- threads ----------------------------------------------------------------------------------------------------


async def test_a_thread_that_is_given_up_is_counted_until_it_ends_and_what_waits_never_begins():
    threads, free, began = Threads(1, "t"), threading.Event(), []
    before = ABANDONED.count
    running = asyncio.ensure_future(threads.run(free.wait, 20))
    waiting = asyncio.ensure_future(threads.run(began.append, 1))
    await asyncio.sleep(0.02)
    running.cancel()
    waiting.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    assert ABANDONED.count == before + 1
    free.set()
    assert await threads.run(lambda: "next") == "next"
    assert (ABANDONED.count, began) == (before, [])
    threads.close()


async def test_what_a_thread_that_was_given_up_raises_is_nobodys(caplog: pytest.LogCaptureFixture):
    threads, free = Threads(1, "t"), threading.Event()

    def fail() -> None:
        free.wait(20)
        raise ValueError

    given_up = asyncio.ensure_future(threads.run(fail))
    await asyncio.sleep(0.02)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    free.set()
    await threads.run(lambda: None)
    await asyncio.sleep(0.02)
    del given_up
    gc.collect()  # asyncio tells of it then
    assert "never retrieved" not in caplog.text
    threads.close()


async def test_what_waits_for_a_thread_is_bounded():
    threads, free = Threads(1, "t", most_waiting=1), threading.Event()
    held = [asyncio.ensure_future(threads.run(free.wait, 20)) for _ in range(2)]
    await asyncio.sleep(0.02)
    with pytest.raises(Busy, match="2 calls"):
        await threads.run(time.sleep, 0)
    free.set()
    await asyncio.gather(*held)
    await asyncio.sleep(0.02)
    assert await threads.run(lambda: "next") == "next"
    threads.close()
