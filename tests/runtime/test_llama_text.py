"""Whole characters only, and never a part of a stop string, however the text is cut into tokens."""

from __future__ import annotations

import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from aim_runtime.engines.llama_cpp.text import AnswerText, StopScanner

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


def until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string to complete, read character by character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def cut(data: st.DataObject, length: int) -> list[int]:
    borders = data.draw(st.lists(st.integers(0, length), max_size=6))
    return sorted({0, length, *borders})


@given(st.text("abc", max_size=30), STOPS, st.data())
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], data: st.DataObject):
    borders = cut(data, len(text))
    scanner, shown = StopScanner(stops), ""
    for start, end in itertools.pairwise(borders):
        shown += scanner.push(text[start:end])
        assert text.startswith(shown)
        if scanner.stopped:
            break
    if not scanner.stopped:
        shown += scanner.finish()
    assert (shown, scanner.stopped) == until_stop(text, stops)


@given(st.text("abc", max_size=30), STOPS)
def test_what_is_shown_never_holds_the_beginning_of_a_stop_that_comes(text: str, stops: list[str]):
    final, stopped = until_stop(text, stops)
    scanner, shown = StopScanner(stops), ""
    for character in text:
        shown += scanner.push(character)
        if scanner.stopped:
            break
        assert len(shown) <= len(final) or not stopped


@given(st.text(max_size=20), st.data())
def test_text_cut_anywhere_between_bytes_arrives_whole(text: str, data: st.DataObject):
    raw = text.encode("utf-8", "replace")
    borders = cut(data, len(raw))
    answer, shown = AnswerText(()), []
    for start, end in itertools.pairwise(borders):
        shown.append(answer.push(raw[start:end]).text)
    shown.append(answer.finish().text)
    assert "".join(shown) == raw.decode()
    assert all((piece == piece.encode().decode() and "\ufffd" not in piece) or "\ufffd" in text for piece in shown)


def test_half_a_character_at_the_end_is_no_text():
    answer = AnswerText(())
    assert answer.push(b"hi " + "🙂".encode()[:2]).text == "hi "
    assert answer.finish().text == ""


def test_logprobs_wait_for_their_text_and_those_of_a_stop_string_are_dropped():
    answer = AnswerText(("END",))
    entry = (b"x", -0.5, [(b"y", -1.0)])
    assert [e.text_offset for e in answer.push(b"go ", entry).logprobs] == [0]
    assert answer.push(b"E", entry).logprobs == []
    assert answer.push(b"N", entry).logprobs == []
    last = answer.push(b"D", entry)
    assert (last.text, last.logprobs, answer.stopped) == ("", [], True)
    assert answer.finish().logprobs == []


def test_logprobs_of_held_text_come_with_it():
    answer = AnswerText(("END",))
    entry = (b"x", -0.5, [])
    answer.push(b"E", entry)
    assert [e.text_offset for e in answer.push(b"Z", entry).logprobs] == [0, 1]


def push_s(stops: list[str]) -> float:
    """CPU seconds of this thread for a text that begins a stop string over and over; the least of three."""
    taken = []
    for _ in range(3):
        began = time.thread_time()
        scanner = StopScanner(stops)
        for _ in range(8000):
            scanner.push("a")
        taken.append(time.thread_time() - began)
    return min(taken)


def test_long_and_many_stop_strings_cost_a_step_a_character():
    assert push_s(["a" * 8000 + "b"]) < 5 * push_s(["a" * 500 + "b"])  # 200 times as much, were each end compared
    assert push_s([f"a{i}" for i in range(3000)]) < 5 * push_s(["a1"])
