"""Streams: nothing of a value leaks at any split, and a streamed answer equals the whole one checked at once."""

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import guardrail_values as made
from aim_guardrail.detectors.base import Finding
from aim_guardrail.detectors.pii_labels import PII_LABELS
from aim_guardrail.pipeline import DetectorFailed, Guard, Session
from aim_guardrail.policy import Policy, Rule, StreamRules, Verdict, shipped_policy
from aim_guardrail.streams import held as stream_module
from aim_guardrail.streams.held import StreamGuard
from aim_guardrail.text import CONTEXT_CHARS, Text, safe_cut

GUARDS: dict[str, Guard] = {}


def guard(secrets: str = "redact", pii: str = "redact", overflow: str = "redact") -> Guard:
    key = f"{secrets} {pii} {overflow}"
    if key not in GUARDS:
        rules = (Rule(type="secrets", action=secrets), Rule(type="pii", action=pii))  # type: ignore[arg-type]
        stream = StreamRules(max_hold_chars=1024, on_overflow=overflow)  # type: ignore[arg-type]
        GUARDS[key] = Guard.load(Policy(version=1, name="t", answer=rules, stream=stream))
    return GUARDS[key]


def run(guard: Guard, deltas: list[str]) -> tuple[list[str], Verdict]:
    """What each push and the finish released, and the final verdict."""
    stream = StreamGuard(guard, Session())
    out = [stream.push(delta).text for delta in deltas]
    last = stream.finish()
    return [*out, last.text], last.verdict


def assert_same_as_whole(guard: Guard, text: str, deltas: list[str]) -> None:
    assert "".join(deltas) == text
    whole = guard.check("answer", text, Session())
    released, verdict = run(guard, deltas)
    assert "".join(released) == whole.text
    assert verdict == whole.verdict


def example() -> tuple[str, list[str]]:
    random = Random(11)
    before, key, after = made.SECRETS["aws-secret"](random)
    card, pem = "4111 1111 1111 1111", made.private_key(random)
    text = f"Sure (the card is {card}), and\n```\n{before}{key}{after}\n{pem}\n```\nis jörg@example.com’s, bye."
    return text, [card, key, pem.splitlines()[1], "jörg@example.com"]


def test_no_part_of_a_value_leaks_at_any_split():
    text, values = example()
    whole = guard().check("answer", text, Session())
    assert whole.text.count("<") == 4
    for at in range(len(text) + 1):
        released, verdict = run(guard(), [text[:at], text[at:]])
        # What went out first is a beginning of the redacted answer: at no time was anything else visible.
        assert whole.text.startswith(released[0])
        assert "".join(released) == whole.text
        assert verdict == whole.verdict
    assert not [value for value in values if value[:6] in whole.text]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_no_part_of_a_value_leaks_character_by_character(size: int):
    text, _ = example()
    assert_same_as_whole(guard(), text, [text[i : i + size] for i in range(0, len(text), size)])


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("break_", ["\n", "\t", "\r\n", '"', "<", "。"])
def test_escapes_of_json_hide_no_value(levels: int, break_: str):
    secret, card = "".join(made.SECRETS["aws-id"](Random(3))), "4111 1111 1111 1111"
    text = f"{break_}{secret}{break_}{card}{break_}jörg@example.com{break_}"
    for _ in range(levels):
        text = json.dumps({"text": text})
    whole = guard().check("answer", text, Session()).text
    assert whole.count("<SECRET_1>") == whole.count("<CREDIT_CARD_1>") == whole.count("<EMAIL_ADDRESS_1>") == 1
    assert "rg@" not in whole
    for _ in range(levels):
        whole = json.loads(whole)["text"]  # still JSON
    for at in range(len(text) + 1):
        assert_same_as_whole(guard(), text, [text[:at], text[at:]])


@pytest.mark.parametrize("kind", [*sorted(made.PII), *sorted(made.SECRETS)])
def test_every_kind_of_value_at_every_split(kind: str):
    for seed in range(3):
        random = Random(seed)
        value = made.PII[kind](random) if kind in made.PII else "".join(made.SECRETS[kind](random))
        text = f"Well, {value} it is, and {value}"
        step = 1 if len(text) < 200 else 7
        for at in range(0, len(text) + 1, step):
            assert_same_as_whole(guard(), text, [text[:at], text[at:]])
        assert_same_as_whole(guard(), text, list(text))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_a_streamed_document_equals_the_whole_one(seed: int):
    random = Random(seed)
    planted = []
    for _ in range(random.randint(0, 4)):
        kind = random.choice([*sorted(made.PII), *sorted(made.SECRETS)])
        planted.append(made.PII[kind](random) if kind in made.PII else "".join(made.SECRETS[kind](random)))
    text = made.document(random, planted)
    assert_same_as_whole(guard(), text, made.splits(random, text))


ATOMS = [
    *"0123456789ABx +-./()[]~:,;\"'`<>{}|\\@%=_\n\té你１\u200b\u0301…½“",
    *["password", "token: ", "secret=", "4111 1111", "+49 ", "GB29 ", "DE89", "://", "http://", "key=", "AKIA", "\\n"],
    *[
        "-----BEGIN RSA PRIVATE KEY-----\n",
        "-----END RSA PRIVATE KEY-----",
        " ext. 12",
        "bob@",
        "example.com",
        "Bearer ",
    ],
    *["\\", "\\\\", "\\u00", "\\u0020", "\\u0040", "\\u200b", "\\u005c", "\\/", '\\"', "\\t", "n", "u"],
    *["7f3a" * 8, "MIIEpAIBAAKCAQEA" * 3, "eyJhbGciOi", "e.g. "],
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(ATOMS), max_size=60))
def test_any_nonsense_streams_as_it_is_checked_whole(atoms: list[str]):
    assert_same_as_whole(guard(), "".join(atoms), atoms)


def test_flags_ride_along_and_hide_nothing():
    text, _ = example()
    flagging = guard("flag", "flag")
    released, verdict = run(flagging, list(text))
    assert "".join(released) == text
    assert (verdict.action, verdict.families) == ("flag", ("secrets", "pii"))
    assert verdict == flagging.check("answer", text, Session()).verdict


def test_nothing_goes_out_from_a_blocked_value_on():
    text, _ = example()
    blocking = guard("block", "redact")
    head = 'Sure (the card is <CREDIT_CARD_1>), and\n```\naws_secret_access_key = "'
    for deltas in ([text], list(text), [text[:80], text[80:]]):
        stream = StreamGuard(blocking, Session())
        released = [stream.push(delta) for delta in deltas]
        released.append(stream.finish())
        assert "".join(r.text for r in released) == head
        first = next(i for i, r in enumerate(released) if r.verdict.blocked)
        assert not any(r.text for r in released[first + 1 :])
    whole = blocking.check("answer", text, Session())
    assert whole.verdict.action == released[-1].verdict.action == "block"
    assert set(released[-1].verdict.families) <= set(whole.verdict.families)


def test_prose_flows_word_by_word():
    prose = "The quick brown fox jumps over it, and then rests. " * 4
    stream = StreamGuard(guard(), Session())
    lag = []
    for i, char in enumerate(prose, 1):
        stream.push(char)
        lag.append(stream.held_chars)
        assert i >= stream.held_chars
    assert max(lag) <= len("rests.")
    assert stream.finish().text == ""


def test_text_without_spaces_flows_too():
    stream = StreamGuard(guard(), Session())
    assert [stream.push(char).text for char in "你好，世界。"] == list("你好，世界。")


def test_a_keyword_already_shown_still_gives_its_value_away():
    value = made.chars(Random(5), 14)
    stream = StreamGuard(guard(), Session())
    shown = "".join(stream.push(delta).text for delta in ["the password", ": "])
    assert shown == "the password: "
    assert stream.push(value + " and").text == "<SECRET_1> "


@pytest.mark.parametrize("tail", [" and on", '" and on', ""])
def test_an_overlong_run_is_withheld_to_its_end(tail: str):
    long = "http://host/" + "a,b;" * 400
    stream = StreamGuard(guard(overflow="redact"), Session())
    deltas = [f"see {long}{tail}"[i : i + 5] for i in range(0, len(long) + 4 + len(tail), 5)]
    released = "".join(stream.push(delta).text for delta in deltas) + (last := stream.finish()).text
    assert released == f"see <UNBROKEN_RUN_1>{tail}"
    assert (last.verdict.action, last.verdict.families) == ("redact", ("stream",))
    assert [(f.label, f.rule_id) for f in last.verdict.findings] == [("UNBROKEN_RUN", "max_hold_chars")]


def test_an_overlong_run_blocks_where_the_policy_says_so():
    stream = StreamGuard(guard(overflow="block"), Session())
    assert stream.push("pi is ").text == "pi is "
    blocked = stream.push("3." + "1415926535" * 110)
    assert (blocked.text, blocked.verdict.action) == ("", "block")
    assert stream.push(" more").text == "" == stream.finish().text


def test_holding_is_bounded():
    stream = StreamGuard(guard(), Session())
    for _ in range(3000):
        stream.push("abcd")
        assert stream.held_chars <= 1024


def test_a_private_key_longer_than_the_cap_is_redacted_whole():
    key = made.private_key(Random(2), size_bytes=2348)  # 4096-bit RSA
    text = f"here:\n{key}\nbye"
    for deltas in ([text], list(text)):
        released, verdict = run(guard(), deltas)
        assert "".join(released) == "here:\n<SECRET_1>\nbye"
        assert verdict.families == ("secrets",)


@pytest.mark.parametrize("line", ["MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSj\n", "Note: and so it goes ", "a"])
def test_what_is_held_is_not_looked_at_for_every_character(line: str, monkeypatch: pytest.MonkeyPatch):
    looked = 0

    def counting(scan: str) -> int:
        nonlocal looked
        looked += len(scan)
        return safe_cut(scan)

    monkeypatch.setattr(stream_module, "safe_cut", counting)
    header, policy = "-----BEGIN PRIVATE KEY-----\n", StreamRules(max_hold_chars=65_536, on_overflow="redact")
    stream = StreamGuard(Guard.load(guard().policy.model_copy(update={"stream": policy}), guard()), Session())
    text = (header if len(line) > 1 else "") + line * (60_000 // len(line))
    for char in text:
        assert stream.push(char).text == ""
    assert stream.held_chars == len(text)
    assert looked < 100 * len(text)


class Late:
    """Breaks the contract: it sees a value only once what follows it is known."""

    family, labels = "pii", frozenset(PII_LABELS)

    def may_find(self, scan: str) -> bool:
        return "late" in scan

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        at = text.scan.find("value")
        return [Finding("pii", "EMAIL_ADDRESS", at, len(text.scan), 1.0, "late")] if "late" in text.scan else []


class Failing(Late):
    def may_find(self, scan: str) -> bool:
        raise ZeroDivisionError

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        raise ZeroDivisionError


def one(detector: Late, on_error: str = "closed") -> StreamGuard:
    policy = Policy(version=1, name="t", answer=(Rule(type="pii", action="redact"),), on_error=on_error)  # type: ignore[arg-type]
    return StreamGuard(Guard(policy, [detector]), Session())


def test_a_value_that_began_in_released_text_blocks_and_is_counted():
    stream = one(Late())
    assert stream.push("value ").text == "value "
    broken = stream.push("late ")
    assert (broken.text, broken.verdict.action) == ("", "block")
    assert [(f.family, f.label, f.rule_id) for f in broken.verdict.findings] == [
        ("stream", "BOUNDARY", "released-boundary")
    ]


def test_a_failing_detector_refuses_and_releases_nothing():
    stream = one(Failing())
    for _ in range(2):
        with pytest.raises(DetectorFailed, match="'pii'"):
            stream.push("some text ")
    with pytest.raises(DetectorFailed):
        stream.finish()


def test_an_open_policy_passes_a_stream_marked_degraded():
    stream = one(Failing(), on_error="open")
    released = stream.push("some text ")
    assert (released.text, released.verdict.degraded) == ("some text ", ("pii",))


def test_a_policy_without_answer_rules_passes_everything_at_once():
    policy = Policy(version=1, name="t", prompt=(Rule(type="pii", action="redact"),))
    stream = StreamGuard(Guard(policy, [Late()]), Session())
    assert stream.push("half a wor").text == "half a wor"


def test_empty_deltas_and_empty_answers():
    stream = StreamGuard(guard(), Session())
    assert stream.push("").text == ""
    assert stream.finish().verdict == Verdict()


def test_only_a_bounded_context_is_kept():
    stream = StreamGuard(guard(), Session())
    for _ in range(500):
        stream.push("word after word ")
    assert len(stream._context) == CONTEXT_CHARS


def test_the_shipped_policy_streams():
    assert_same_as_whole(Guard.load(shipped_policy("values")), example()[0], list(example()[0]))
