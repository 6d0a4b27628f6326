"""Tokens are drawn from the distribution that was asked for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aim_runtime.engines.llama_cpp.sampling import NoToken, Sampler, SamplingParams, log_probabilities

NO_PROMPT = np.empty(0, np.int32)
ROWS = arrays(np.float32, st.integers(2, 40), elements=st.floats(-20, 20, width=32))


def sampler(prompt: list[int] | None = None, choice: int = 0, **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), np.array(prompt or [], np.int32), choice)


def probabilities(row: np.ndarray[Any, Any], temperature: float = 1.0) -> np.ndarray[Any, Any]:
    weights = np.exp((row.astype(np.float64) - float(row.max())) / temperature)
    return weights / weights.sum()


def nucleus(p: np.ndarray[Any, Any], top_p: float) -> set[int]:
    order = np.argsort(-p, kind="stable")
    mass, kept = 0.0, set()
    for token in order:
        kept.add(int(token))
        mass += p[token]
        if mass >= top_p:
            break
    return kept


@given(ROWS)
def test_temperature_zero_takes_the_likeliest(row: np.ndarray[Any, Any]):
    assert row[sampler(temperature=0.0).draw(row)] == row.max()


@given(ROWS, st.integers(1, 10), st.integers(0, 99))
def test_top_k_draws_among_the_k_likeliest(row: np.ndarray[Any, Any], k: int, seed: int):
    token = sampler(top_k=k, seed=seed).draw(row)
    # Logits this near are equally likely in float32: any of them may be among the k.
    assert row[token] >= np.sort(row)[-min(k, row.size)] - 1e-6


@given(ROWS, st.floats(0.05, 0.99), st.integers(0, 99), st.floats(0.3, 3))
def test_top_p_draws_from_the_nucleus(row: np.ndarray[Any, Any], top_p: float, seed: int, temperature: float):
    token = sampler(top_p=top_p, seed=seed, temperature=temperature).draw(row)
    p = probabilities(row, temperature)
    # Float32 may put a token on the edge in or out: allow ties and a hair.
    assert p[token] >= min(p[list(nucleus(p, min(1.0, top_p + 1e-5)))]) * (1 - 1e-4)


@given(ROWS, st.floats(0.01, 1.0), st.integers(0, 99))
def test_min_p_keeps_what_is_likely_enough(row: np.ndarray[Any, Any], min_p: float, seed: int):
    p = probabilities(row)
    assert p[sampler(min_p=min_p, seed=seed).draw(row)] >= min_p * p.max() * (1 - 1e-4)


def test_frequencies_follow_the_tempered_distribution():
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draws = 20_000
    drawing = sampler(seed=7, temperature=2.0)
    counts = Counter(drawing.draw(row) for _ in range(draws))
    expected = probabilities(row, 2.0)
    for token, p in enumerate(expected):  # five standard deviations
        assert abs(counts[token] / draws - p) < 5 * (p * (1 - p) / draws) ** 0.5


def test_a_seed_repeats_and_choices_differ():
    row = np.zeros(1000, np.float32)
    first, again, other = sampler(seed=3), sampler(seed=3), sampler(seed=3, choice=1)
    a, b, c = ([s.draw(row) for _ in range(20)] for s in (first, again, other))
    assert a == b
    assert a != c


def test_penalties_and_bias_change_the_named_tokens_only():
    drawing = sampler([2], presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, logit_bias=((3, 9.0),))
    drawing.accept(0)
    drawing.accept(0)
    row = np.array([4.0, 4.0, -1.0, 0.0], np.float32)
    drawing.adjust(row)
    # 0: generated twice: 4/2 - 0.5 - 2*0.25; 2: in the prompt only: -1*2; 3: bias
    assert row.tolist() == [1.0, 4.0, -2.0, 9.0]


def test_presence_and_frequency_ignore_the_prompt():
    drawing = sampler([1], presence_penalty=1.0, frequency_penalty=1.0)
    row = np.ones(3, np.float32)
    drawing.adjust(row)
    assert row.tolist() == [1.0, 1.0, 1.0]


@given(ROWS)
def test_log_probabilities_sum_to_one_and_are_ordered(row: np.ndarray[Any, Any]):
    chosen, top = log_probabilities(row, 0, row.size)
    values = [value for _, value in top]
    assert sum(np.exp(values)) == pytest.approx(1.0, abs=1e-5)
    assert values == sorted(values, reverse=True)
    assert chosen == pytest.approx(dict(top)[0])
    assert log_probabilities(row, 0, 0) == (pytest.approx(chosen), [])


@pytest.mark.parametrize("row", [[-np.inf] * 4, [0.0, np.nan, 1.0, 2.0], [0.0, np.inf, 1.0, 2.0]], ids=str)
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 2}], ids=str)
def test_where_nothing_can_be_drawn_it_says_so(row: list[float], params: dict[str, Any]):
    with pytest.raises(NoToken):
        sampler(**params).draw(np.array(row, np.float32))


@given(
    arrays(np.float32, 12, elements=st.floats(-1000, 1000, width=32)),
    st.sampled_from([0.01, 1.0, 100.0]),
    st.sampled_from([0.0, 1e-5, 1.0, 100.0]),
    st.sampled_from([1e-300, 0.5, 1.0]),
    st.sampled_from([0.0, 1e-300, 1.0]),
)
def test_every_legal_parameter_draws(row: Any, repetition: float, temperature: float, top_p: float, min_p: float):
    drawing = sampler(
        list(range(12)),
        repetition_penalty=repetition,
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=2.0,
        frequency_penalty=-2.0,
        logit_bias=((0, -100.0), (1, 100.0)),
        seed=1,
    )
    drawing.accept(3)
    drawing.adjust(row)
    assert 0 <= drawing.draw(row) < 12
