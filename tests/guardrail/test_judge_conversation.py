"""Which of what was said is judged, and what of the rest is told beside it."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_guardrail.detectors.base import Passage
from aim_guardrail.detectors.judge.backend import TooLong
from aim_guardrail.detectors.judge.conversation import MOST_WINDOWS, Hearing, Turn, fitted, hearings, windows


def said(*messages: tuple[str, str], direction: Literal["prompt", "answer"] = "prompt") -> list[Passage]:
    return [Passage(text, direction, role) for role, text in messages]


U, A = "user", "assistant"


@pytest.mark.parametrize(
    ("messages", "turns", "judged"),
    [
        ([(U, "a")], [(U, "a")], (0,)),
        ([("system", "s"), (U, "a")], [(U, "s\n\na")], (0, 1)),
        ([(U, "a"), (A, "b"), (U, "c")], [(U, "a"), (A, "b"), (U, "c")], (2,)),
        ([(U, "a"), (U, "b")], [(U, "a\n\nb")], (0, 1)),
        # What a tool or a document says is put before the model like a user's words.
        ([(U, "a"), (A, "call"), ("tool", "t"), (U, "c")], [(U, "a"), (A, "call"), (U, "t\n\nc")], (2, 3)),
        # Texts outside messages, wherever they stand in the body (tools, metadata), come first.
        ([(U, "a"), (A, "b"), (U, "c"), ("", "tool")], [(U, "tool\n\na"), (A, "b"), (U, "c")], (2,)),
        # Without roles (embeddings, V1, tensors): all of it.
        ([("", "x"), ("", "y")], [(U, "x\n\ny")], (0, 1)),
    ],
)
def test_of_a_prompt_the_last_turn_is_judged(
    messages: list[tuple[str, str]], turns: list[tuple[Literal["user", "assistant"], str]], judged: tuple[int, ...]
):
    assert hearings(said(*messages), ()) == [Hearing(tuple(Turn(side, text) for side, text in turns), judged)]


def test_an_answer_that_the_client_has_begun_is_judged_beside_what_was_asked():
    first, second = hearings(said((U, "a"), (A, "Sure, here is how to")), ())
    assert first == Hearing((Turn("user", "a"),), (0,))
    assert second == Hearing((Turn("user", "a"), Turn("assistant", "Sure, here is how to")), (1,))


def test_an_answer_is_judged_behind_its_prompt_all_choices_at_once():
    answer = said((A, "one"), (A, "two"), direction="answer")
    assert hearings(answer, said(("system", "s"), (U, "a"))) == [
        Hearing((Turn("user", "s\n\na"), Turn("assistant", "one\n\ntwo")), (0, 1))
    ]
    assert hearings(answer, ()) == [Hearing((Turn("assistant", "one\n\ntwo"),), (0, 1))]


def test_nothing_to_judge_is_no_question():
    assert hearings([], ()) == []


def test_the_oldest_context_goes_first_and_the_judged_turn_never():
    turns = [Turn("user", "a" * 300), Turn("assistant", "b" * 300), Turn("user", "c" * 300)]
    assert list(fitted(turns, 1000)) == [tuple(turns)]
    assert list(fitted(turns, 700)) == [tuple(turns[1:])]
    assert list(fitted(turns, 300)) == [tuple(turns[2:])]


@given(length=st.integers(0, 5700), most=st.integers(600, 1200))
def test_windows_hold_every_place_with_what_stands_around_it(length: int, most: int):
    text = "".join(chr(0x4E00 + at) for at in range(length))
    parts = windows(text, most)
    assert all(len(part) <= most for part in parts)
    assert parts[0] == text[: len(parts[0])]
    assert text.endswith(parts[-1])
    for at in range(0, max(length - 256, 1), 97):
        assert any(text[at : at + 256] in part for part in parts)


def test_what_would_take_too_many_questions_is_refused_not_cut():
    most = 600
    longest = MOST_WINDOWS * (most - 256) + 256
    assert len(windows("x" * longest, most)) == MOST_WINDOWS
    with pytest.raises(TooLong, match="raise context_tokens"):
        windows("x" * (longest + 1), most)
