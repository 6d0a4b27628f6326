"""What guard models say: none is misread, and none that cannot be read counts as safe.

`judge_answers.jsonl`: answers recorded by others (`source`), and forms that may come (`made`).
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_guardrail.detectors.judge.backend import Said, Token, Unreadable
from aim_guardrail.detectors.judge.conversation import Turn
from aim_guardrail.detectors.judge.granite_guardian import GUARDIANS, GraniteGuardian
from aim_guardrail.detectors.judge.llama_guard import GUARDS, LlamaGuard
from aim_guardrail.detectors.judge.probability import probability

Row = dict[str, Any]
ROWS: list[Row] = [
    json.loads(line)
    for line in Path(__file__).with_name("judge_answers.jsonl").read_text(encoding="utf-8").splitlines()
]
ALL: dict[str, LlamaGuard | GraniteGuardian] = {**GUARDS, **GUARDIANS}


def read(judge: str, said: Said, **options: Any) -> dict[str, float]:
    guard = replace(ALL[judge], **options)
    return guard.read(guard.questions([Turn("user", "?")])[0], said)


def said(row: Row) -> Said:
    tokens = tuple(Token(text, logprob, top) for text, logprob, top in row.get("logprobs", []))
    return Said(row["text"], tokens, row.get("is_cut", False))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['judge']}: {row['text'][:30]!r}")
def test_no_answer_is_misread(row: Row):
    options = {"reads_logprobs": "logprobs" in row}
    if row.get("unreadable"):
        with pytest.raises(Unreadable):
            read(row["judge"], said(row), **options)
    else:
        assert read(row["judge"], said(row), **options) == pytest.approx(row["labels"], rel=1e-4)


def test_there_are_recorded_answers_and_some_of_each_judge():
    assert {row["judge"] for row in ROWS if "labels" in row} == set(ALL)
    assert len([row for row in ROWS if "source" in row]) >= 14
    assert all(("source" in row) != ("made" in row) for row in ROWS)


def verdict(*tokens: Token) -> Said:
    return Said("".join(token.text for token in tokens), tokens)


def test_the_sampled_token_counts_though_the_list_leaves_it_out():
    """A "Yes" beside a list that has "No" alone is no P(unsafe) of 0."""
    answer = verdict(Token("Yes", math.log(0.6), {"No": math.log(0.3)}))
    assert read("granite-guardian-3.1", answer) == {"HARM": pytest.approx(2 / 3)}


@pytest.mark.parametrize("top", [{}, {"No": -0.1}, {"No": -0.1, "no": -3.0, "Well": -4.0}])
def test_a_probability_that_is_not_known_is_never_taken_for_0(top: dict[str, float]):
    with pytest.raises(Unreadable, match="no probabilities of both 'yes' and 'no'"):
        read("granite-guardian-3.1", verdict(Token("No", -0.1, top)))


@pytest.mark.parametrize("tokens", [(), (Token("\n\n", 0.0, {"\n\n": 0.0}),), (Token("unsafe", 0.0, {}),)])
def test_logprobs_that_are_not_the_answer_s_are_refused(tokens: tuple[Token, ...]):
    with pytest.raises(Unreadable, match="logprobs"):
        read("llama-guard-3", Said("safe", tokens))


def test_without_probabilities_the_word_alone_counts_where_the_policy_says_so():
    assert read("llama-guard-3", Said("unsafe\nS1,S10"), reads_logprobs=False) == {"VIOLENT_CRIMES": 1.0, "HATE": 1.0}
    with pytest.raises(Unreadable, match="no logprobs"):
        read("llama-guard-3", Said("unsafe\nS1,S10"))


def test_a_word_in_pieces_is_known_by_its_first():
    pieces = (
        Token("un", math.log(0.8), {"un": math.log(0.8), "safe": math.log(0.1), "s": math.log(0.1)}),
        Token("safe", 0.0, {"safe": 0.0}),
        Token("\nS1", 0.0, {}),
    )
    assert read("llama-guard-3", verdict(*pieces)) == {"VIOLENT_CRIMES": pytest.approx(0.8)}


def test_spellings_of_a_word_count_together():
    top = {"Yes": math.log(0.5), " Yes": math.log(0.2), "yes": math.log(0.1), "No": math.log(0.15), "Maybe": -5.0}
    answer = verdict(Token("Yes", math.log(0.5), top))
    assert probability(answer, 0, ("yes", "no")) == pytest.approx(0.8 / 0.95)


@given(
    bad=st.floats(1e-12, 1), good=st.floats(1e-12, 1), lead=st.sampled_from(["", "\n\n", " "]), other=st.floats(0, 1)
)
def test_a_probability_is_one(bad: float, good: float, lead: str, other: float):
    top = {"unsafe": math.log(bad), "safe": math.log(good), "S": math.log(other + 1e-12)}
    tokens = (*([Token(lead, 0.0, {})] if lead else []), Token("safe", math.log(good), top))
    (score,) = read("llama-guard-3", verdict(*tokens)).values()
    assert 0 < score < 1 or bad + good > 0
    assert 0 <= score <= 1


@given(st.text(max_size=60))
def test_whatever_a_judge_says_it_is_a_verdict_or_unreadable(text: str):
    for judge in ALL:
        with contextlib.suppress(Unreadable):
            assert read(judge, Said(text), reads_logprobs=False).keys() <= set(ALL[judge].labels)
