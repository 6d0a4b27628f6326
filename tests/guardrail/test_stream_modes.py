"""`stream.mode`, each through the real proxy before a predictor that really streams: each does what it is named for.

The predictor speaks for a second and a half, a word every 20 ms; the fifth sentence holds what is looked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from aim_kserve.identity import keys
from closed_pair import bearer
from fake_predictor import FakePredictor, words
from guarded import ask, eventually, metric, orders
from served import Served

MODES = ("holdback", "buffer", "observe", "off")
MAIL = "jane.doe@example.com"
PROSE = "The quick brown fox jumps over a lazy dog, then it rests for a while. "
CHAT = "/v1/chat/completions"


@dataclass
class Mode:
    """A mode's policy: whoever asks with these headers is judged by it."""

    server: Served
    headers: dict[str, str]

    @property
    def url(self) -> str:
        return self.server.url

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.server, name, headers=self.headers, **labels)


def write(directory: Path, tenant: str, mode: str, answer: str) -> None:
    rules = f"prompt: [{{type: pii, action: redact}}]\nanswer: [{answer}]\n"
    text = f"version: 2\nname: '{tenant}'\ntenant: '{tenant}'\nbudget_ms: 5000\n{rules}stream: {{mode: '{mode}'}}\n"
    (directory / f"{tenant}.yaml").write_text(text)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, predictor: FakePredictor) -> Iterator[dict[str, Mode]]:
    """A tenant of one process for each mode: words are blocked, mild ones and personal data redacted; and, ``inline-``
    before its name, one without any batch detector."""
    directory, file = tmp_path_factory.mktemp("modes"), tmp_path_factory.mktemp("keys") / "keys.yaml"
    (directory / "default.yaml").write_text("version: 2\nname: t\nprompt: [{type: pii, action: redact}]\n")
    for mode in MODES:
        write(directory, mode, mode, "{type: pii, action: redact}, {type: words, action: {BAD: block, MILD: redact}}")
        write(directory, f"inline-{mode}", mode, "{type: secrets, action: block}")
    tenants = [tenant for mode in MODES for tenant in (mode, f"inline-{mode}")]
    made = {tenant: keys.new_key(tenant, tenant=tenant, scopes=["infer", "metrics"]) for tenant in tenants}
    keys.write(file, keys.KeyFile(keys=tuple(entry for _, entry in made.values())))
    flags = ["--model_name", "m", "--predictor_host", predictor.host, "--policy", str(directory)]
    with Served(["-m", "word_family", *flags, "--api_keys", str(file)]) as server:
        yield {tenant: Mode(server, bearer(text)) for tenant, (text, _) in made.items()}


class Got:
    """A streamed answer, with when each event came."""

    def __init__(self, mode: Mode, text: str, path: str = CHAT, token_s: float = 0.02, **more: Any) -> None:
        self.times: list[float] = []
        self.data: list[Any] = []
        self.comments: list[float] = []
        told = {**mode.headers, **orders(tokens=words(text), token_s=token_s)}
        body = {**ask("hi", stream=True), "input": "hi", "prompt": "hi", **more}
        started = time.monotonic()
        with httpx.stream("POST", mode.url + path, json=body, headers=told, timeout=30) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                now_s = time.monotonic() - started
                if line.startswith("data: "):
                    item = line.removeprefix("data: ")
                    self.data.append(item if item == "[DONE]" else orjson.loads(item))
                    self.times.append(now_s)
                elif line.startswith(":"):
                    self.comments.append(now_s)
        self.took_s = time.monotonic() - started

    @property
    def text(self) -> str:
        """What was said, by the deltas of whichever protocol."""
        return "".join(self.pieces)

    @property
    def pieces(self) -> list[str]:
        said = []
        for event in self.data:
            choices = event.get("choices", ()) if event != "[DONE]" else ()
            said += [(choice.get("delta") or {}).get("content") or choice.get("text") or "" for choice in choices]
            kind = event.get("type") if event != "[DONE]" else ""
            if kind == "response.output_text.delta":
                said.append(event["delta"])
            elif kind == "content_block_delta":
                said.append(event["delta"]["text"])
        return [piece for piece in said if piece]

    @property
    def first_s(self) -> float:
        """When the first word came."""
        at = next(
            n for n, event in enumerate(self.data) if event != "[DONE]" and "quick" in orjson.dumps(event).decode()
        )
        return self.times[at]

    @property
    def reasons(self) -> list[str]:
        choices = [c for event in self.data if event != "[DONE]" for c in event.get("choices", ())]
        return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


CLEAN = PROSE * 5
REDACTED = PROSE * 3 + f"Mail {MAIL} or mildword now. " + PROSE * 2
BLOCKED = PROSE * 4 + "Then badword comes. " + PROSE * 3
HIDDEN = REDACTED.replace(MAIL, "<EMAIL_ADDRESS_1>").replace("mildword", "<MILD_1>")


@pytest.mark.parametrize("mode", MODES)
def test_what_nothing_is_found_in_is_delivered_in_every_mode(servers: dict[str, Mode], mode: str) -> None:
    got = Got(servers[mode], CLEAN, token_s=0)
    assert got.text == CLEAN
    assert got.reasons == ["stop"]
    assert got.data[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("mode", "shown"), [("holdback", HIDDEN), ("buffer", HIDDEN), ("observe", REDACTED), ("off", REDACTED)]
)
def test_what_is_to_be_redacted(servers: dict[str, Mode], mode: str, shown: str) -> None:
    """Held back or buffered it is redacted; observed or not judged, it goes out as it came."""
    before = servers[mode].metric("guardrail_detections_total", family="words", label="MILD")
    got = Got(servers[mode], REDACTED, token_s=0)
    assert got.text == shown
    assert got.reasons == ["stop"]
    counted = servers[mode].metric("guardrail_detections_total", family="words", label="MILD") - before
    assert counted == (0 if mode == "off" else 1)


@pytest.mark.parametrize(
    ("mode", "seen"), [("holdback", "no"), ("buffer", "nothing"), ("observe", "yes"), ("off", "all")]
)
def test_what_is_blocked(servers: dict[str, Mode], predictor: FakePredictor, mode: str, seen: str) -> None:
    """Held back: what is proven before it; buffered: nothing; observed: the word itself, then it is cut; off: all."""
    before = servers[mode].metric("guardrail_requests_total", direction="answer", decision="block")
    got = Got(servers[mode], BLOCKED)
    if seen == "all":
        assert got.text == BLOCKED
    else:
        assert got.reasons == ["content_filter"]
        assert got.data[-1] == "[DONE]"
        assert len(got.text) < len(BLOCKED)
        assert BLOCKED.startswith(got.text)
        assert eventually(lambda: predictor.open == 0)
    assert ("badword" in got.text) == (seen in ("yes", "all"))
    assert (got.text == "") == (seen == "nothing")
    assert seen != "no" or "quick" in got.text
    blocks = servers[mode].metric("guardrail_requests_total", direction="answer", decision="block") - before
    assert blocks == (0 if mode == "off" else 1)


@pytest.mark.parametrize("mode", MODES)
def test_when_it_is_delivered(servers: dict[str, Mode], mode: str) -> None:
    """At once; a sentence later; or, buffered, when all of it has been said."""
    got = Got(servers[mode], CLEAN)
    spread_s = got.times[-1] - got.first_s
    if mode == "buffer":
        assert spread_s < got.took_s / 4
        assert got.first_s > got.took_s / 2
    else:
        assert spread_s > got.took_s / 2
    if mode in ("observe", "off"):
        assert got.first_s < got.took_s / 2
        assert got.pieces == words(CLEAN)


def test_observed_text_is_out_before_it_is_judged(servers: dict[str, Mode]) -> None:
    """A judge that takes its time holds nothing up but the end of the connection."""
    text = "The quick slowword. " * 8
    got = Got(servers["observe"], text, token_s=0)
    assert got.text == text
    assert got.data[-1] == "[DONE]"
    assert got.times[-1] < got.took_s - 0.1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_are_those_of_every_route(servers: dict[str, Mode], path: str, mode: str) -> None:
    got = Got(servers[mode], REDACTED, path, token_s=0)
    assert got.text == (REDACTED if mode in ("observe", "off") else HIDDEN)
    got = Got(servers[mode], BLOCKED, path)
    assert ("badword" in got.text) == (mode in ("observe", "off"))
    if mode == "off":
        assert got.text == BLOCKED
    elif path.endswith("responses"):
        assert got.data[-1]["type"] == "response.incomplete"
        assert got.data[-1]["response"]["incomplete_details"] == {"reason": "content_filter"}
        numbers = [event["sequence_number"] for event in got.data]
        assert numbers == list(range(len(numbers)))
    elif path.endswith("messages"):
        kinds = [event["type"] for event in got.data]
        assert got.data[-2]["delta"]["stop_reason"] == "refusal"
        assert kinds[0] == "message_start"
        assert kinds[-1] == "message_stop"
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == (mode != "buffer")
    else:
        assert got.reasons == ["content_filter"]


def test_a_buffered_stream_keeps_its_connection(servers: dict[str, Mode]) -> None:
    text = "quick " + "and so on " * 4
    got = Got(servers["buffer"], text, token_s=0.35)
    assert got.comments
    assert got.comments[0] < got.first_s
    assert got.text == text


def test_a_buffered_answer_is_redacted_as_the_whole_one(servers: dict[str, Mode]) -> None:
    server = servers["buffer"]
    told = {**server.headers, **orders(say=REDACTED)}
    whole = httpx.post(server.url + CHAT, json=ask("hi"), headers=told, timeout=30)
    assert Got(server, REDACTED, token_s=0).text == whole.json()["choices"][0]["message"]["content"]


def test_unary_answers_are_judged_whatever_the_mode(servers: dict[str, Mode]) -> None:
    for mode in MODES:
        told = {**servers[mode].headers, **orders(say=BLOCKED)}
        answer = httpx.post(servers[mode].url + CHAT, json=ask("hi"), headers=told, timeout=30)
        assert answer.status_code == 400
        assert answer.headers["x-guardrail-families"] == "words"


@pytest.mark.parametrize("mode", ["holdback", "buffer", "observe"])
def test_the_inline_stage_keeps_to_the_mode(servers: dict[str, Mode], predictor: FakePredictor, mode: str) -> None:
    """Without any batch detector, too."""
    key = "AKIA" + "3XPZ7QKLMN2VWTYB"
    text = f"{PROSE}The key {key} is it. {PROSE}"
    got = Got(servers[f"inline-{mode}"], text)
    assert got.reasons == ["content_filter"]
    expected = {"holdback": text[: text.index(key)], "buffer": ""}
    if mode in expected:
        assert got.text == expected[mode]
    else:
        assert f"The key {key} " in got.text
        assert len(got.text) < len(text)
    assert eventually(lambda: predictor.open == 0)
