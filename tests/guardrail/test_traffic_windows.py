"""Counting: no window ever holds more than its limit, here and in Redis; what is given back is free at once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from aim_guardrail.metrics import Metrics
from aim_guardrail.traffic.counters import Counters, CountersAway
from aim_guardrail.traffic.local import LocalWindows
from aim_guardrail.traffic.shared import SharedAway, SharedWindows
from aim_guardrail.traffic.windows import WINDOWS, Charge, Standing, Window
from redis_server import RedisServer

SMALL = Window(width_ms=10, buckets=5)
MINUTE = WINDOWS["minute"]
SLOW = Window(width_ms=10_000, buckets=5)  # Redis forgets by its own clock
NAMES = itertools.count()
START_MS = 1_700_000_000_000


def charge(key: str = "k", limit: int = 10, cost: int = 1, window: Window = SMALL) -> Charge:
    return Charge(key, "others", limit, cost, window)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


#: Steps of time in ms and what each takes; of two limits, as a request does.
STEPS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12), st.integers(-6, 6)), max_size=40)


@given(steps=STEPS, limit=st.integers(1, 20))
@settings(max_examples=200)
def test_no_window_holds_more_than_the_limit(steps: list[tuple[int, int, int]], limit: int) -> None:
    windows, now, taken = LocalWindows(), START_MS, list[tuple[int, int]]()
    for step, cost, _ in steps:
        now += step
        fits, (stand,) = windows.take([charge(limit=limit, cost=cost)], now)
        if fits:
            taken.append((now, cost))
        elif stand.wait_ms > 0:
            assert windows.take([charge(limit=limit, cost=cost)], now + stand.wait_ms - 1)[0] is False
            assert copied(windows).take([charge(limit=limit, cost=cost)], now + stand.wait_ms)[0]
        else:
            assert cost > limit
    length = SMALL.width_ms * SMALL.buckets
    for start, _ in taken:
        assert sum(cost for at, cost in taken if start <= at < start + length) <= limit


def copied(windows: LocalWindows) -> LocalWindows:
    copy = LocalWindows()
    copy._counts = {key: dict(count) for key, count in windows._counts.items()}
    return copy


@pytest.mark.system
@given(steps=STEPS, limits=st.tuples(st.integers(1, 20), st.integers(1, 20)))
@settings(max_examples=60)
def test_redis_counts_as_we_do(redis: RedisServer, steps: list[tuple[int, int, int]], limits: tuple[int, int]) -> None:
    async def compare() -> None:
        here, there, now, name = LocalWindows(), SharedWindows(redis.url, 5), START_MS, next(NAMES)
        for step, cost, delta in steps:
            now += step * 1000
            asked = [charge(f"{name}-{at}", limit, cost + at, SLOW) for at, limit in enumerate(limits)]
            expected = here.take(asked, now)
            assert await there.take(asked, now) == expected
            if expected[0] and delta:
                correction = [(each, stand.bucket, delta) for each, stand in zip(asked, expected[1], strict=True)]
                here.settle(correction, now + step)
                await there.settle(correction, now + step)
        await there.close()

    asyncio.run(compare())


def test_all_are_taken_or_none() -> None:
    windows = LocalWindows()
    assert windows.take([charge("a", 10, 4), charge("b", 3, 4)], START_MS)[0] is False
    assert windows.take([charge("a", 10, 10)], START_MS)[0]


def test_what_is_given_back_is_free_at_once_and_never_twice() -> None:
    windows = LocalWindows()
    _, (stand,) = windows.take([charge(cost=10)], START_MS)
    windows.settle([(charge(), stand.bucket, -50)], START_MS)
    fits, (after,) = windows.take([charge(cost=10)], START_MS)
    assert (fits, after.used) == (True, 10)


def test_what_was_used_beyond_the_estimate_is_owed() -> None:
    windows = LocalWindows()
    _, (stand,) = windows.take([charge(cost=4)], START_MS)
    windows.settle([(charge(), stand.bucket, 20)], START_MS)
    fits, (after,) = windows.take([charge()], START_MS)
    assert (fits, after.used) == (False, 24)
    assert windows.take([charge()], START_MS + after.wait_ms)[0]


def test_a_request_larger_than_the_limit_never_passes() -> None:
    assert LocalWindows().take([charge(limit=3, cost=4)], START_MS) == (False, [Standing(0, -1, 0, START_MS // 10)])


def test_made_up_callers_cost_no_memory_and_reset_nobody() -> None:
    windows = LocalWindows(max_keys=100)
    mine = charge("mine", 1, window=MINUTE)
    assert windows.take([mine], START_MS)[0]
    admitted = sum(windows.take([charge(f"made-up-{n}", 1, window=MINUTE)], START_MS + n)[0] for n in range(10_000))
    assert admitted == 100  # 99 that had room, and all others together
    assert len(windows) == 101
    assert windows.take([mine], START_MS + 20_000)[0] is False
    assert windows.take([charge("later", 1, window=MINUTE)], START_MS + 200_000)[0]
    assert len(windows) <= 3


@pytest.mark.parametrize("window", WINDOWS.values())
def test_a_busy_count_keeps_its_size(window: Window) -> None:
    windows = LocalWindows()
    for step in range(1000):
        windows.take([charge(limit=10**12, cost=10**6, window=window)], START_MS + step * window.width_ms)
    (count,) = windows._counts.values()
    assert len(count) <= window.buckets + 1


@pytest.mark.system
async def test_redis_keeps_no_more_than_the_window_and_forgets_it(redis: RedisServer) -> None:
    shared = SharedWindows(redis.url, 5)
    for step in range(300):
        await shared.take([charge("bounded", 10**12, 10**6, MINUTE)], START_MS + step * 1000)
    assert 60 <= int(redis.ask(b"HLEN aim:limit:bounded").strip(b":\r\n")) <= 62
    assert 0 < int(redis.ask(b"TTL aim:limit:bounded").strip(b":\r\n")) <= 61
    await shared.close()


@pytest.mark.system
async def test_redis_that_is_away_is_asked_once_a_second(redis: RedisServer) -> None:
    with RedisServer() as gone:
        url = gone.url
    shared = SharedWindows(url, 1)
    for _ in range(50):
        with pytest.raises(SharedAway):
            await shared.take([charge()])
    assert shared.failures == 1
    await shared.close()


@pytest.mark.system
async def test_redis_that_is_back_counts_at_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that a killed Redis left in the pool are not tried one after another."""
    monkeypatch.setattr("aim_guardrail.traffic.shared.RETRY_AFTER_S", 0.0)
    with RedisServer() as redis:
        shared = SharedWindows(redis.url, 5)
        await asyncio.gather(*(shared.take([charge(limit=100)]) for _ in range(8)))
        await asyncio.to_thread(redis.kill)
        with pytest.raises(SharedAway):
            await shared.take([charge()])
        await asyncio.to_thread(redis.start)
        taken = await asyncio.gather(*(shared.take([charge(limit=100)]) for _ in range(8)))
        assert [fits for fits, _ in taken] == [True] * 8
        await shared.close()


@pytest.mark.system
async def test_a_replica_alone_gives_its_share() -> None:
    registry = CollectorRegistry()
    with RedisServer() as gone:
        url = gone.url
    counters = Counters(Metrics(registry), SharedWindows(url, 1), replicas=3)
    fits = [(await counters.take([charge(limit=10, window=MINUTE)])).fits for _ in range(5)]
    assert fits == [True, True, True, False, False]
    assert registry.get_sample_value("guardrail_ratelimit_without_redis_total", {"outcome": "local"}) == 5
    await counters.close()


@pytest.mark.system
async def test_without_a_share_nothing_is_known() -> None:
    with RedisServer() as gone:
        url = gone.url
    counters = Counters(Metrics(CollectorRegistry()), SharedWindows(url, 1))
    with pytest.raises(CountersAway):
        await counters.take([charge()])
    await counters.close()
