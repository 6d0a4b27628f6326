"""How answers are scored, and which bounds a tuned model must keep."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_trainer.errors import GateError
from aim_trainer.evaluate.gates import GateResult, held, require
from aim_trainer.evaluate.scores import MOST_WORDS, exact_match, rouge_l
from aim_trainer.job.judged import Gate


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004, the paper's own example
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("The cat!", "the  CAT", 1.0),
        ("", "", 1.0),
        ("...", "", 1.0),
        ("", "a", 0.0),
        ("a", "b", 0.0),
        ("東京は", "東京へ", 2 / 3),  # written without spaces: a sign is a word
        ("naïve café", "naïve bar", 0.5),
    ],
)
def test_rouge_l(answer: str, wanted: str, score: float) -> None:
    assert rouge_l(answer, wanted) == pytest.approx(score)


words = st.lists(st.sampled_from("abcde"), max_size=12)


@given(words, words)
def test_rouge_l_is_what_the_table_of_the_textbook_says(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    total = len(first) + len(second)
    expected = 2 * table[-1][-1] / total if first and second else float(first == second)
    assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected)


def test_a_text_without_end_is_looked_at_up_to_a_bound() -> None:
    assert rouge_l("a " * MOST_WORDS + "b " * 500_000, "a " * MOST_WORDS) == 1.0


def test_exact_match_overlooks_white_space_alone() -> None:
    assert exact_match(" a\n b", "a b") == 1
    assert exact_match("A b", "a b") == 0


BASE = {"eval_loss": 2.5, "exact_match": 0.2}
TUNED = {"eval_loss": 1.5, "exact_match": 0.6, "rouge_l": 0.5, "perplexity": math.nan}


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        (Gate(metric="eval_loss", max=1.5), 1.5, True),
        (Gate(metric="eval_loss", max=1.4), 1.5, False),
        (Gate(metric="exact_match", min=0.6), 0.6, True),
        (Gate(metric="exact_match", min=0.7), 0.6, False),
        (Gate(metric="eval_loss", maxDelta=-0.5), -1.0, True),
        (Gate(metric="eval_loss", maxDelta=-1.5), -1.0, False),
        (Gate(metric="exact_match", minDelta=0.3), 0.4, True),
        (Gate(metric="exact_match", minDelta=0.5), 0.4, False),
    ],
)
def test_a_bound_is_kept_or_not(gate: Gate, value: float, passed: bool) -> None:
    (result,) = held([gate], BASE, TUNED, {})
    assert result.value == pytest.approx(value)
    assert result.passed is passed


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (Gate(metric="guardrail_blocked", max=1), "the guardrail is away"),
        (Gate(metric="regressions", min=0), "nobody measured it"),
        (Gate(metric="rouge_l", minDelta=-1), "nobody measured it"),
        (Gate(metric="perplexity", max=1e9), "it is not a number"),
    ],
)
def test_what_was_not_measured_fails_however_wide_the_bound(gate: Gate, reason: str) -> None:
    (result,) = held([gate], BASE, TUNED, {"guardrail_blocked": "the guardrail is away"})
    assert (result.passed, result.value, result.reason) == (False, None, reason)


def test_each_failed_bound_is_named_with_its_value() -> None:
    gates = [Gate(metric="eval_loss", min=0, max=1.0, maxDelta=-2), Gate(metric="regressions", min=1)]
    with pytest.raises(GateError) as raised:
        require(held(gates, BASE, TUNED, {}))
    assert raised.value.exit_code == 4
    assert str(raised.value) == (
        "3 of 4 gates failed; what was trained is kept:\n"
        "  eval_loss: 1.5, max 1\n"
        "  eval_loss: -1, maxDelta -2\n"
        "  regressions: min 1: not measured: nobody measured it"
    )


def test_gates_that_are_kept_say_nothing() -> None:
    require([GateResult("eval_loss", "max", 2, 1, True)])
    require([])
