"""The lengths of answers: true quantiles of what was seen lately, at any age."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_runtime.qos.lengths import Lengths


def exact(lengths: list[int], q: float, at_least: int = 0) -> int:
    longer = sorted(length for length in lengths if length > at_least)
    return longer[min(len(longer) - 1, int(q * len(longer)))]


def seen(lengths: list[int]) -> Lengths:
    histogram = Lengths()
    for length in lengths:
        histogram.observe("low", length)
    return histogram


def lognormal(count: int, median: float, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [max(1, round(rng.lognormvariate(0, 0.8) * median)) for _ in range(count)]


@pytest.mark.parametrize("median", [3, 40, 600])
@pytest.mark.parametrize("q", [0.1, 0.5, 0.8, 0.9])
def test_quantiles_at_any_age(median: int, q: float):
    lengths = lognormal(4000, median, 7)
    histogram = seen(lengths)
    for age in (0, median // 2, median, 2 * median):
        found = histogram.quantile("low", q, age)
        assert found == pytest.approx(exact(lengths[-1000:], q, age), rel=0.25, abs=1.5)


def test_an_age_says_more_than_the_time_already_spent():
    histogram = seen(([10] * 9 + [1000]) * 100)
    assert histogram.quantile("low", 0.5) == 10
    assert histogram.quantile("low", 0.5, at_least=11) > 800
    assert histogram.ending("low", 0)(10) > 0.85
    assert histogram.ending("low", 11)(100) < 0.02


def test_a_change_of_load_is_followed():
    histogram = seen([20] * 5000)
    assert histogram.quantile("low", 0.9) <= 23
    for _ in range(1000):
        histogram.observe("low", 500)
    assert histogram.quantile("low", 0.5) == pytest.approx(500, rel=0.2)
    mean, mean_square = histogram.moments("low")
    assert mean == pytest.approx(470, rel=0.15)
    assert mean_square == pytest.approx(mean * 480, rel=0.15)


def test_before_there_is_data_anything_is_possible():
    histogram = Lengths()
    assert 10 < histogram.quantile("high", 0.5) < 200 < histogram.quantile("high", 0.9) < 4096
    assert histogram.quantile("high", 0.5, at_least=3000) > 3000


def test_classes_know_nothing_of_each_other():
    histogram = seen([1] * 1000)
    assert histogram.quantile("low", 0.9) == 1
    assert histogram.quantile("high", 0.9) == Lengths().quantile("high", 0.9)


def test_a_hundred_thousand_observations_neither_overflow_nor_grow():
    histogram = Lengths()
    for number in range(100_000):
        histogram.observe("low", 1 + number % 100)
    assert histogram.quantile("low", 0.5) == pytest.approx(50, abs=8)


lengths_strategy = st.lists(st.integers(1, 2**21), max_size=50)


@settings(deadline=None)
@given(lengths_strategy, st.lists(st.floats(0, 1), min_size=2, max_size=6), st.integers(0, 2**21))
def test_quantiles_rise_and_lie_beyond_the_age(lengths: list[int], shares: list[float], age: int):
    histogram = seen(lengths)
    found = [histogram.quantile("low", q, age) for q in sorted(shares)]
    assert all(value > age for value in found)
    assert all(one <= other for one, other in pairwise(found))


@settings(deadline=None)
@given(lengths_strategy, st.integers(0, 2**21), st.lists(st.floats(0, 2**21), min_size=2, max_size=6))
def test_what_is_to_come_is_a_distribution(lengths: list[int], age: int, horizons: list[float]):
    histogram = seen(lengths)
    shares = [histogram.ending("low", age)(horizon) for horizon in sorted(horizons)]
    assert all(0 <= share <= 1 for share in shares)
    assert all(one <= other + 1e-12 for one, other in pairwise(shares))


@settings(deadline=None)
@given(lengths_strategy, st.floats(0.01, 0.99), st.integers(0, 10_000))
def test_a_quantile_is_what_ends_within_it(lengths: list[int], q: float, age: int):
    histogram = seen(lengths)
    assert histogram.ending("low", age)(histogram.quantile("low", q, age) - age) >= q - 1e-6
