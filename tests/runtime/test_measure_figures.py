"""Percentiles, goodput and the knee, from what became of each request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_profile.serving.evidence import Percentiles, Point, Slo
from aim_runtime.measure.client import Outcome
from aim_runtime.measure.figures import is_good, knee, percentile, point
from aim_runtime.measure.rising import Rising

NO_SLO = Slo()


def outcome(due: float = 0.0, late: float = 0.0, first: float = 0.1, gaps: tuple[float, ...] = (0.01,)) -> Outcome:
    tokens = [due + first]
    for gap in gaps:
        tokens.append(tokens[-1] + gap)
    return Outcome(due, due + late, tokens[-1], tokens, prompt_tokens=5, output_tokens=len(tokens))


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_the_smallest_value_that_covers_its_share(values: list[float], share: float) -> None:
    ordered = sorted(values)
    found = percentile(ordered, share)
    assert found in values
    assert sum(each <= found for each in values) >= share * len(values) - 1e-9
    assert sum(each < found for each in values) < share * len(values)


def test_percentiles_of_a_hundred() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert [percentile(ordered, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]


def test_latency_counts_from_when_a_request_was_due_not_from_when_it_was_sent() -> None:
    found = point(1, [outcome(due=1.0, late=0.5, first=0.7)], (), NO_SLO, began_s=0, least_s=1)
    assert found.ttft_ms == Percentiles(p50=700, p95=700, p99=700)
    assert found.client_lag_ms == 500
    assert not found.valid


def test_a_client_that_kept_up_is_valid_and_a_late_clock_is_not() -> None:
    kept = [outcome(due=float(index), late=0.001) for index in range(50)]
    assert point(1, kept, [0.001] * 50, NO_SLO, began_s=0, least_s=50).valid
    assert not point(1, kept, [0.2] * 50, NO_SLO, began_s=0, least_s=50).valid
    slow = [outcome(due=float(index), late=0.05, first=3.0) for index in range(50)]
    assert point(1, slow, (), NO_SLO, began_s=0, least_s=50).valid  # 50 ms of 3 s


def test_counts_rates_and_failures_by_kind() -> None:
    outcomes = [outcome(due=10.0, gaps=(0.01, 0.03)) for _ in range(4)]
    outcomes += [Outcome(10, 10, 10.5, failed=kind) for kind in ("http 503", "http 503", "timeout")]
    found = point(2, outcomes, (), Slo(ttft_ms=100.5), began_s=10, least_s=2)
    assert (found.answered, found.failed) == (4, {"http 503": 2, "timeout": 1})
    assert (found.duration_s, found.requests_per_s, found.output_tokens_per_s) == (2, 2, 6)
    assert (found.prompt_tokens, found.output_tokens) == (20, 12)
    assert found.itl_ms == Percentiles(p50=10, p95=30, p99=30)
    assert found.e2e_ms == Percentiles(p50=140, p95=140, p99=140)
    assert found.goodput_per_s == 2
    assert point(2, outcomes, (), Slo(ttft_ms=99), began_s=10, least_s=2).goodput_per_s == 0
    assert point(2, outcomes, (), NO_SLO, began_s=10, least_s=2).goodput_per_s is None


def test_nothing_answered_has_no_figures() -> None:
    found = point(2, [Outcome(0, 0, 1, failed="connection")], (), NO_SLO, began_s=0, least_s=1)
    assert (found.answered, found.ttft_ms, found.itl_ms, found.e2e_ms) == (0, None, None, None)


def test_a_good_answer_keeps_its_tokens_apart_on_average() -> None:
    uneven = outcome(gaps=(0.01, 0.05))
    assert is_good(uneven, Slo(itl_ms=31))
    assert not is_good(uneven, Slo(itl_ms=29))


def at(offered: float, tokens: float, ttft_p95: float = 10, failed: int = 0, **more: Any) -> Point:
    percentiles = Percentiles(p50=1, p95=ttft_p95, p99=ttft_p95)
    counts = {"failed": {"http 503": failed} if failed else {}, "prompt_tokens": 1, "output_tokens": 1}
    rates = {"requests_per_s": tokens / 10, "output_tokens_per_s": tokens}
    return Point(offered=offered, duration_s=1, answered=100, **counts, **rates, ttft_ms=percentiles, **more)


@pytest.mark.parametrize(
    ("points", "slo", "expected"),
    [
        ([at(1, 10), at(2, 20), at(4, 40)], NO_SLO, None),
        ([at(1, 10), at(2, 20), at(4, 21)], NO_SLO, (2, "throughput no longer rises (20 to 21 tokens/s) at 4")),
        ([at(1, 10), at(2, 20, 300)], Slo(ttft_ms=200), (1, "TTFT p95 of 300 ms is over 200 ms at 2")),
        ([at(1, 10), at(2, 20, failed=50)], NO_SLO, (1, "50 of 150 requests failed at 2")),
        ([at(1, 10, 300), at(2, 20, 300)], Slo(ttft_ms=200), None),
        ([at(1, 10), at(2, 9, valid=False), at(4, 40)], NO_SLO, None),
        (
            [at(1, 10, goodput_per_s=1), at(2, 20, goodput_per_s=1.01)],
            Slo(ttft_ms=200),
            (1, "goodput no longer rises (1 to 1.01 requests/s) at 2"),
        ),
    ],
)
def test_the_knee_is_the_last_level_that_was_served_well(
    points: list[Point], slo: Slo, expected: tuple[float, str] | None
) -> None:
    found = knee(points, slo)
    assert (found and (found.offered, found.because)) == expected


async def test_load_doubles_to_the_knee_and_closes_in_on_it() -> None:
    asked: list[float] = []

    async def server_of_11(level: float) -> Point:
        asked.append(level)
        return at(level, min(level, 11.0) * 10)

    rising = Rising(server_of_11, NO_SLO, whole=False)
    await rising.until_the_knee(1.0)
    assert asked == [1, 2, 4, 8, 16, 32, 24, 20]
    assert [each.offered for each in rising.points] == sorted(asked)
    assert rising.knee is not None
    assert rising.knee.offered == 16


async def test_an_overloaded_first_level_ends_it_and_so_does_the_time() -> None:
    async def failing(level: float) -> Point:
        return at(level, 1, failed=99)

    rising = Rising(failing, NO_SLO, whole=True)
    await rising.until_the_knee(1.0)
    assert (len(rising.points), rising.knee, rising.out_of_time) == (1, None, False)

    async def late(level: float) -> Point | None:
        return at(level, level) if level < 3 else None

    timed = Rising(late, NO_SLO, whole=True)
    await timed.listed([4, 2, 1, 2])
    assert ([each.offered for each in timed.points], timed.out_of_time) == ([1, 2], True)
