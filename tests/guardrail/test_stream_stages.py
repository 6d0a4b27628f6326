"""Streamed answers judged by batch detectors: windows, side by side, in order, bounded; what is found; failures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from random import Random
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

import word_family
from aim_guardrail.detectors.base import Finding
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import parse_policy
from aim_guardrail.streams.events import StreamScreen
from aim_guardrail.streams.staged import Staged
from aim_guardrail.streams.windows import OVERLAP_CHARS, WINDOW_CHARS, Track
from aim_kserve.errors import ServingError
from aim_kserve.sse import EventReader

MAIL = "jane.doe@example.com"
PROSE = "The quick brown fox jumps over a lazy dog, then it rests for a while. "


def policy(answer: str, **stream: Any) -> str:
    rules = "\n".join(f"  - {rule}" for rule in answer.split(" | "))
    lines = "".join(f", {key}: {value}" for key, value in stream.items())
    return f"version: 2\nname: t\nbudget_ms: 5000\nanswer:\n{rules}\nstream: {{max_hold_chars: 65536{lines}}}\n"


BLOCK = "{type: words, action: block}"
REDACT = "{type: pii, action: redact} | {type: words, action: {BAD: redact, MILD: flag}}"


class Answer:
    """A stream through both layers, in this process; ``late``: what is sent once the client has seen ``after``."""

    def __init__(self, source: str) -> None:
        self.guard = Guard.load(parse_policy(source, "t.yaml"))
        (self.words,) = [bounded.detector for bounded in self.guard.stages.detectors.values()]
        self.metrics = Metrics(CollectorRegistry())
        self.screening = Screening(self.guard, self.metrics, RequestContext("/v1/chat/completions"))
        self.out: list[bytes] = []
        self.taken = 0

    async def of(self, events: list[bytes], pause_s: float = 0) -> list[Any]:
        """What the client gets, event by event."""

        async def chunks() -> AsyncIterator[bytes]:
            for event in events:
                self.taken += 1
                yield event
                await asyncio.sleep(pause_s)

        screen = StreamScreen(self.screening, self.metrics)
        staged = Staged(self.screening, self.metrics, screen)
        try:
            async with aclosing(staged.shown(chunks(), EventReader())) as shown:
                async for piece in shown:
                    self.out.append(piece)
        except ServingError as error:
            self.out.append(screen.failure(error))
        finally:
            screen.close()
        return parsed(b"".join(self.out))


def parsed(raw: bytes) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in raw.split(b"\n") if line.startswith(b"data: ")]
    return [line.decode() if line == b"[DONE]" else orjson.loads(line) for line in lines]


def frame(choice: dict[str, Any], **more: Any) -> bytes:
    return b"data: " + orjson.dumps({"id": "c", "choices": [{"index": 0, **choice}], **more}) + b"\n\n"


def chat(*deltas: Any) -> list[bytes]:
    said = [frame({"delta": d if isinstance(d, dict) else {"content": d}, "finish_reason": None}) for d in deltas]
    first = frame({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
    return [first, *said, frame({"delta": {}, "finish_reason": "stop"}), b"data: [DONE]\n\n"]


def tokens(text: str, size: int = 4) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def shown(got: list[Any], field: str = "content", choice: int = 0) -> str:
    choices = [c for event in got if event != "[DONE]" for c in event.get("choices", ()) if c["index"] == choice]
    return "".join((c.get("delta") or {}).get(field) or "" for c in choices)


def reasons(got: list[Any]) -> list[str]:
    choices = [c for event in got if event != "[DONE]" for c in event.get("choices", ())]
    return [c["finish_reason"] for c in choices if c["finish_reason"]]


# --- windows --------------------------------------------------------------------------------------------------------


def test_many_values_in_one_window_cost_no_more_than_their_number():
    def cpu_s(values: int) -> float:
        track, start = Track(is_whole=True), time.process_time()
        for _ in range(values):
            track.push("Jane Doe, ", 0.0)
        track.cut(ends=True)
        for at in range(values):
            assert track.counts("PERSON", 10 * at, 10 * at + 8)
            track.hide(10 * at, 10 * at + 8, f"<PERSON_{at}>")
        assert [track.shown(10 * at, "Jane Doe, ") for at in range(values)][-1] == f"<PERSON_{values - 1}>, "
        return time.process_time() - start

    once = min(cpu_s(500) for _ in range(3))
    assert min(cpu_s(8_000) for _ in range(2)) < 4 * 16 * once


@given(seed=st.integers(0, 2**32))
def test_windows_cover_a_text_however_it_comes(seed: int) -> None:
    """Each character is proven once, in order; what is proven without a sentence's end has its overlap behind it."""
    random = Random(seed)
    text = "".join(random.choice(["word ", "end. ", "a", "é", "\n", PROSE, "x" * 90]) for _ in range(40))
    track, windows, at = Track(is_whole=False), [], 0
    while at < len(text):
        size = random.choice([1, 5, 40, 500])
        track.push(text[at : at + size], 0.0)
        windows += track.cut(ends=random.random() < 0.05)
        at += size
    windows += track.cut(ends=True)
    assert windows[-1].proven_to == len(text)
    end = 0
    for window in windows:
        assert window.text == text[window.start : window.end]
        assert len(window.text) <= WINDOW_CHARS
        assert window.start <= end <= window.end
        assert not end or not window.text or end - window.start >= min(OVERLAP_CHARS, end)
        end = window.end
    assert [w.proven_to for w in windows] == sorted(w.proven_to for w in windows)


@given(seed=st.integers(0, 2**32))
def test_what_is_hidden_is_hidden_however_it_comes(seed: int) -> None:
    random = Random(seed)
    text = "".join(chr(ord("a") + at % 26) for at in range(300))
    track, expected, end = Track(is_whole=True), "", 0
    for start in sorted(random.sample(range(0, 300, 10), 5)):
        stop = start + random.randint(1, 10)
        expected += text[end:start] + "<X>"
        end = stop
        track.hide(start, stop, "<X>")
    expected += text[end:]
    got, at = "", 0
    while at < len(text):
        size = random.choice([1, 3, 11, 50])
        got += track.shown(at, text[at : at + size])
        at += size
    assert got == expected


# --- what goes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 50, 10_000])
async def test_what_nothing_is_found_in_goes_out_whole(size: int) -> None:
    text = PROSE * 12 + "and a last word without an end"
    answer = Answer(policy(BLOCK))
    got = await answer.of(chat(*tokens(text, size)))
    assert shown(got) == text
    assert reasons(got) == ["stop"]
    assert got[-1] == "[DONE]"
    assert max(len(passage.text) for passage in answer.words.asked) <= WINDOW_CHARS
    assert {passage.direction for passage in answer.words.asked} == {"answer"}


async def test_a_text_goes_out_while_it_goes_on() -> None:
    """No window is waited for that text which has gone out lies in; nor is the whole answer."""
    answer = Answer(policy(BLOCK))
    await answer.of(chat(*tokens(PROSE * 12)), pause_s=0.002)
    firsts = [at for at, piece in enumerate(answer.out) if b"fox" in piece or b"lazy" in piece]
    assert firsts
    assert len(answer.out) > 10
    assert answer.out[0].count(b'"role":"assistant"') == 1  # who speaks is told at once


@pytest.mark.parametrize("at", [0, 70, 180, 250, 256, 257, 400, 800])
@pytest.mark.parametrize("size", [1, 4, 97])
async def test_a_block_shows_nothing_of_its_window(at: int, size: int) -> None:
    text = (PROSE * 14)[:at] + " badword " + PROSE * 6
    answer = Answer(policy(BLOCK))
    got = await answer.of(chat(*tokens(text, size)))
    assert "bad" not in shown(got)
    assert text.startswith(shown(got))
    assert at - WINDOW_CHARS - size <= len(shown(got)) <= at + 1
    assert reasons(got) == ["content_filter"]
    assert got[-1] == "[DONE]"
    assert answer.screening.action == "block"
    assert answer.screening.families == {"words": None}


async def test_a_block_stops_the_predictor_at_once() -> None:
    answer = Answer(policy(BLOCK))
    await answer.of(chat("badword. " + PROSE, *tokens(PROSE * 200)), pause_s=0.001)
    assert answer.taken < 400


@pytest.mark.parametrize("size", [1, 4, 97, 10_000])
async def test_what_is_found_is_redacted_where_it_stands(size: int) -> None:
    """Over any window's border, beside what the inline stage redacts; counted once."""
    text = "".join(f"{PROSE[: 7 * n % 60]}badword {n} {MAIL} mildword " for n in range(40)) + "badword"
    answer = Answer(policy(REDACT))
    got = await answer.of(chat(*tokens(text, size)))
    assert shown(got) == text.replace("badword", "<BAD_1>").replace(MAIL, "<EMAIL_ADDRESS_1>")
    counted = answer.metrics._detections("words", "BAD", "redact")._value.get()
    assert counted == text.count("badword")
    assert answer.metrics._detections("words", "MILD", "flag")._value.get() == text.count("mildword")
    assert answer.screening.action == "redact"
    assert reasons(got) == ["stop"]


async def test_every_kind_of_text_is_judged() -> None:
    """Reasoning, refusals, arguments, citations, new fields; each choice's; a completion's text."""
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a": "badword", "b": 7}'}}
    cite = {"type": "url_citation", "url_citation": {"title": "badword", "url": "https://x.org/"}}
    deltas = [{"reasoning_content": "so badword"}, {"refusal": "no badword"}, {"thoughts": [{"deep": "a badword"}]}]
    got = await Answer(policy(REDACT)).of(chat(*deltas, {"tool_calls": [call]}, {"annotations": [cite]}))
    whole = orjson.dumps(got)
    assert b"badword" not in whole
    assert whole.count(b"<BAD_1>") == 5
    calls = [c["delta"]["tool_calls"] for e in got[:-1] for c in e["choices"] if c["delta"].get("tool_calls")]
    arguments = "".join(call["function"]["arguments"] for (call,) in calls)
    assert orjson.loads(arguments) == {"a": "<BAD_1>", "b": 7}
    events = [frame({"text": "a bad", "finish_reason": None}), frame({"text": "word", "finish_reason": "stop"})]
    got = await Answer(policy(REDACT)).of([*events, b"data: [DONE]\n\n"])
    assert "".join(c["text"] for e in got[:-1] for c in e["choices"]) == "a <BAD_1>"


@pytest.mark.parametrize("seed", range(25))
async def test_texts_that_come_at_once_are_each_redacted_as_a_whole(seed: int) -> None:
    """Two choices, each thinking and speaking in pieces of any size, in any order."""
    random = Random(seed)
    words = ["badword ", "mildword ", PROSE, "x" * random.randint(1, 300) + " ", "end. ", f"{MAIL} ", "\n"]
    places = [(choice, field) for choice in (0, 1) for field in ("content", "reasoning")]
    texts = {place: "".join(random.choices(words, k=random.randint(1, 25))) for place in places}
    left = {place: tokens(text, random.choice([1, 4, 20, 400])) for place, text in texts.items()}
    events = []
    while any(left.values()):
        choice, field = place = random.choice([place for place, pieces in left.items() if pieces])
        events.append(frame({"index": choice, "delta": {field: left[place].pop(0)}, "finish_reason": None}))
    events += [frame({"index": choice, "delta": {}, "finish_reason": "stop"}) for choice in (0, 1)]
    got = await Answer(policy(REDACT)).of([*events, b"data: [DONE]\n\n"])
    for (choice, field), text in texts.items():
        expected = text.replace("badword", "<BAD_1>").replace(MAIL, "<EMAIL_ADDRESS_1>")
        assert shown(got, field, choice) == expected
    assert reasons(got) == ["stop", "stop"]


async def test_choices_are_judged_apart() -> None:
    events = []
    for at, piece in enumerate(tokens(PROSE * 8)):
        events += [frame({"index": n, "delta": {"content": piece if at != 30 * n else "bad" * n}}) for n in (0, 1)]
    events += [frame({"index": n, "delta": {}, "finish_reason": "stop"}) for n in (0, 1)]
    got = await Answer(policy(REDACT)).of([*events, b"data: [DONE]\n\n"])
    expected = tokens(PROSE * 8)
    assert shown(got) == "".join(["", *expected[1:]])
    expected[30] = "bad"
    assert shown(got, choice=1) == "".join(expected)


async def test_a_text_is_not_held_by_one_that_has_fallen_silent() -> None:
    """What was thought is judged as far as it goes when the answer begins: nothing waits for a window to fill."""
    answer = Answer(policy(BLOCK))
    deltas = [{"reasoning": "hm, well"}, *({"content": f"word{n} "} for n in range(30))]
    await answer.of([*chat(*deltas)[:-2]], pause_s=0.005)
    assert any(b"hm" in piece for piece in answer.out[:-1])


# --- side by side, bounded ------------------------------------------------------------------------------------------


async def test_windows_are_judged_side_by_side_and_bounded() -> None:
    text = ("slowword " + PROSE) * 40
    answer = Answer(policy(BLOCK))
    events = chat(*tokens(text, 30))
    task = asyncio.ensure_future(answer.of(events))
    await asyncio.sleep(0.2)
    assert answer.words.most_at_once == 8
    assert answer.taken < len(events) / 2  # the rest waits at the predictor
    got = await task
    assert shown(got) == text
    assert answer.words.most_at_once == 8


async def test_a_client_that_does_not_read_holds_the_predictor_up() -> None:
    answer = Answer(policy(BLOCK))
    filler = "x" * 10_000
    events = chat(*([filler + " "] * 2000))
    task = asyncio.ensure_future(answer.of(events))
    answer.out = _Stuck()  # type: ignore[assignment]
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, RuntimeError)):
        await task
    assert answer.taken < 400


class _Stuck(list[bytes]):
    def append(self, _: bytes) -> None:
        raise RuntimeError("stuck")


async def test_more_than_may_be_buffered_is_refused() -> None:
    answer = Answer(policy(BLOCK, mode="buffer"))
    got = await answer.of(chat(*(["word " * 6000] * 800)))
    assert [event if event == "[DONE]" else event["error"]["code"] for event in got] == ["answer_too_large", "[DONE]"]
    assert answer.taken < 700


# --- in time --------------------------------------------------------------------------------------------------------


async def test_text_waits_no_longer_than_it_may() -> None:
    """A model that pauses in mid-sentence: what there is, is judged and goes out."""
    answer = Answer(policy(BLOCK, max_hold_ms=200))
    task = asyncio.ensure_future(answer.of(chat("one two three ")[:-2], pause_s=1.5))
    while not task.done() and b"two" not in b"".join(answer.out):  # noqa: ASYNC110  a list without an event
        await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_late_judge_ends_the_stream_or_not_as_the_policy_says() -> None:
    text = PROSE * 4 + "hangword " + PROSE
    closed = Answer(policy(BLOCK, max_hold_ms=300))
    got = await closed.of(chat(*tokens(text)))
    assert got[-2]["error"]["code"] == "guardrail_timeout"
    assert got[-2]["error"]["type"] == "service_unavailable"
    assert got[-1] == "[DONE]"
    assert "hang" not in shown(got)
    opened = Answer(policy("{type: words, action: block, on_timeout: open}", max_hold_ms=300))
    got = await opened.of(chat(*tokens(text)))
    assert shown(got) == text
    assert list(opened.screening.degraded) == ["words"]


async def test_a_failing_judge_ends_the_stream_or_not_as_the_policy_says() -> None:
    text = PROSE * 4 + "failword " + PROSE
    got = await Answer(policy(BLOCK)).of(chat(*tokens(text)))
    assert got[-2]["error"]["code"] == "guardrail_failed"
    assert "fail" not in shown(got)
    opened = Answer(policy("{type: words, action: block, on_error: open}"))
    assert shown(await opened.of(chat(*tokens(text)))) == text
    assert list(opened.screening.degraded) == ["words"]


async def test_what_breaks_off_is_told_behind_what_is_proven() -> None:
    got = await Answer(policy(BLOCK)).of(chat(*tokens(PROSE * 3))[:-2])
    assert shown(got) == PROSE * 3
    assert got[-2]["error"]["code"] == "predictor_broken"


def test_the_fake_is_a_batch_detector() -> None:
    found = asyncio.run(word_family.Words().scan_batch([], None))  # type: ignore[arg-type]
    assert found == list[list[Finding]]()
