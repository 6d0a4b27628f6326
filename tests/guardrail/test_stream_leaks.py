"""No value leaks from a stream, at any split: whole values, every position, each place that text comes in.

``SOAK_VALUES=300`` (`make soak`): 60 secrets, cards, IBANs, e-mail addresses and telephone numbers each.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry

import guardrail_values as values
import word_family  # noqa: F401  a batch detector
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import parse_policy, shipped_policy
from aim_guardrail.streams.events import StreamScreen
from aim_guardrail.streams.staged import Staged
from aim_kserve.sse import Event, EventReader

COUNT = int(os.environ.get("SOAK_VALUES", "25"))
CONTEXT = RequestContext("/v1/chat/completions")
SHORT = [name for name in values.SECRETS if name != "private-key"]


def secret(random: Random) -> tuple[str, str, str]:
    """One in twenty is a private key: those are long, and so are their positions many."""
    name = "private-key" if random.random() < 0.05 else random.choice(SHORT)
    return values.SECRETS[name](random)


def alone(make: Callable[[Random], str]) -> Callable[[Random], tuple[str, str, str]]:
    return lambda random: ("", make(random), "")


KINDS: dict[str, Callable[[Random], tuple[str, str, str]]] = {
    "secret": secret,
    "card": alone(values.card),
    "iban": alone(values.iban),
    "email": alone(values.email),
    "phone": alone(values.phone),
}
PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "content": lambda text: {"content": text},
    "reasoning": lambda text: {"reasoning_content": text},
    "arguments": lambda text: {"tool_calls": [{"index": 0, "function": {"arguments": text}}]},
}


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard.load(shipped_policy("values"))


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def test_no_character_of_any_value_leaks_at_any_split(guard: Guard, metrics: Metrics) -> None:
    """What goes out, at any time, is a beginning of what is shown of the whole: the text is only ever added to."""
    streams = 0
    for number in range(COUNT):
        kind = list(KINDS)[number % len(KINDS)]
        before, value, after = KINDS[kind](Random(number))
        for place, delta in PLACES.items():
            text = f"Take {before}{value}{after} and go."
            if place == "arguments":
                text = orjson.dumps({"a": text}).decode()
            shown = whole(guard, metrics, text, place)
            assert value not in shown, (kind, number)
            for cut in range(1, len(text)):
                got = streamed(guard, metrics, [delta(text[:cut]), delta(text[cut:])])
                streams += 1
                assert got == shown, (kind, number, place, cut)
    assert streams > COUNT * 60
    print(f"{COUNT} values, {streams} streams: 0 leaked characters")


@pytest.mark.parametrize("mode", ["holdback", "buffer"])
async def test_nor_behind_the_inline_stage(mode: str) -> None:
    """The same where a batch detector judges what the inline stage lets pass."""
    rules = "[{type: secrets, action: redact}, {type: pii, action: redact}, {type: words, action: block}]"
    source = f"version: 2\nname: t\nbudget_ms: 5000\nanswer: {rules}\nstream: {{mode: {mode}}}\n"
    staged, metrics = Guard.load(parse_policy(source, "t.yaml")), Metrics(CollectorRegistry())
    for number, kind in enumerate(KINDS):
        before, value, after = KINDS[kind](Random(number))
        text = f"Take {before}{value}{after} and go."
        shown = whole(staged, metrics, text, "content")
        assert value not in shown
        for cut in range(1, len(text), 1 if COUNT > 100 else 3):
            pieces = [text[:cut], text[cut:]]
            assert await behind(staged, metrics, pieces) == shown, (kind, cut)


async def behind(guard: Guard, metrics: Metrics, pieces: list[str]) -> str:
    """All text that the client gets through both layers."""
    choices: list[Any] = [{"index": 0, "delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    raw = [b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n" for choice in choices]

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in [*raw, b"data: [DONE]\n\n"]:
            yield chunk

    screening = Screening(guard, metrics, CONTEXT)
    stream = StreamScreen(screening, metrics)
    out = b"".join([shown async for shown in Staged(screening, metrics, stream).shown(chunks(), EventReader())])
    stream.close()
    lines = [line[6:] for line in out.split(b"\n") if line.startswith(b"data: {")]
    return "".join(strings(choice["delta"]) for line in lines for choice in orjson.loads(line)["choices"])


def whole(guard: Guard, metrics: Metrics, text: str, place: str) -> str:
    """What the unary answer shows."""
    screening = Screening(guard, metrics, CONTEXT)
    return screening.json_text("answer", text) if place == "arguments" else screening.text("answer", text)


def streamed(guard: Guard, metrics: Metrics, deltas: list[dict[str, Any]]) -> str:
    """All text that the client gets."""
    stream = StreamScreen(Screening(guard, metrics, CONTEXT), metrics)
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    out = []
    for chunk in chunks:
        data = orjson.dumps(chunk)
        for frame in stream.frames(Event(b"data: " + data + b"\n\n", data)):
            out += [strings(choice["delta"]) for choice in orjson.loads(frame.encoded()[6:])["choices"]]
    stream.close()
    return "".join(out)


def strings(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(map(strings, value.values()))
    return "".join(map(strings, value)) if isinstance(value, list) else value if isinstance(value, str) else ""
