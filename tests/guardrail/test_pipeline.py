"""The guard on whole texts: verdicts, redaction, failing detectors."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_guardrail.detectors.base import Finding
from aim_guardrail.detectors.families import FAMILIES
from aim_guardrail.pipeline import DetectorFailed, Guard, Session
from aim_guardrail.pipeline.ruling import Ruling, as_sent, redact_parts
from aim_guardrail.policy import Policy, Rule, Verdict, shipped_policy
from aim_guardrail.text import Text


class Words:
    """A detector of the word `bad` (as an e-mail address) that fails on the word `boom`."""

    def __init__(self, family: str = "pii", label: str = "EMAIL_ADDRESS") -> None:
        self.family, self.labels, self._label = family, frozenset(FAMILIES[family].labels), label

    def may_find(self, scan: str) -> bool:
        return True

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        if "boom" in text.scan:
            raise ZeroDivisionError("the text is none of the log's business")
        at = text.scan.find("bad", since)
        return [Finding(self.family, self._label, *text.span(at, at + 3), 1.0, "words")] if at >= 0 else []


def guard(action: str = "redact", on_error: str = "closed") -> Guard:
    rules = (Rule(type="pii", action=action),)  # type: ignore[arg-type]
    return Guard(Policy(version=1, name="t", prompt=rules, answer=rules, on_error=on_error), [Words()])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def chat() -> Guard:
    return Guard.load(shipped_policy("values"))


def test_allows_and_leaves_untouched_what_holds_nothing():
    checked = guard().check("prompt", "all is fine", Session())
    assert (checked.text, checked.verdict.action) == ("all is fine", "allow")


@pytest.mark.parametrize(("action", "text"), [("redact", "so <EMAIL_ADDRESS_1>!"), ("flag", "so bad!"), ("block", "")])
def test_acts_as_the_rule_says(action: str, text: str):
    checked = guard(action).check("answer", "so bad!", Session())
    assert (checked.text, checked.verdict.action, checked.verdict.families) == (text, action, ("pii",))
    assert [(f.start, f.end) for f in checked.verdict.findings] == [(3, 6)]


def test_a_failing_detector_refuses_and_is_named_without_the_text():
    with pytest.raises(DetectorFailed, match="detector 'pii' failed: ZeroDivisionError") as caught:
        guard().check("prompt", "boom", Session())
    assert "business" not in str(caught.value)
    assert caught.value.detector == "pii"


def test_open_policies_pass_and_say_so():
    checked = guard(on_error="open").check("prompt", "boom bad", Session())
    assert (checked.text, checked.verdict.action, checked.verdict.degraded) == ("boom bad", "allow", ("pii",))


def test_a_detector_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("no such engine")

    monkeypatch.setattr("aim_guardrail.pipeline.guard.build_detector", fail)
    with pytest.raises(DetectorFailed, match=r"'secrets' failed: cannot be loaded \(OSError: no such engine\)"):
        Guard.load(shipped_policy("values"))


def test_each_direction_has_its_own_rules():
    only_answers = Policy(version=1, name="t", answer=(Rule(type="pii", action="redact"),))
    one_way = Guard(only_answers, [Words()])
    assert one_way.check("prompt", "bad", Session()).text == "bad"
    assert one_way.check("answer", "bad", Session()).text == "<EMAIL_ADDRESS_1>"
    assert (one_way.watches("prompt"), one_way.watches("answer")) == (False, True)


def test_placeholders_are_stable_within_a_session_and_shared_by_both_directions(chat: Guard):
    session = Session()
    prompt = chat.check("prompt", "I am a@example.com, he is b@example.com, me again: A@example.com", session)
    assert prompt.text == "I am <EMAIL_ADDRESS_1>, he is <EMAIL_ADDRESS_2>, me again: <EMAIL_ADDRESS_1>"
    assert chat.check("answer", "b@example.com has 4111 1111 1111 1111", session).text == (
        "<EMAIL_ADDRESS_2> has <CREDIT_CARD_1>"
    )
    assert chat.check("answer", "or 4111111111111111", session).text == "or <CREDIT_CARD_1>"
    assert chat.check("answer", "b@example.com", Session()).text == "<EMAIL_ADDRESS_1>"
    assert "example" not in repr(vars(session))


def test_the_chat_policy_blocks_a_secret_in_a_prompt_and_gives_no_text(chat: Guard):
    prompt = "why does AK" + "IAQ3EGRBL7JX2VWP5M fail for bob@example.com?"
    checked = chat.check("prompt", prompt, Session())
    assert (checked.text, checked.verdict.action) == ("", "block")
    assert checked.verdict.families == ("secrets", "pii")
    assert chat.check("answer", prompt, Session()).text == "why does <SECRET_1> fail for <EMAIL_ADDRESS_1>?"


def test_a_password_in_a_uri_wins_over_the_address_it_looks_like(chat: Guard):
    text = "use postgres://app:s3cr3tPw9@db.example.com/app now"
    checked = chat.check("answer", text, Session())
    assert checked.text == "use postgres://app:<SECRET_1>/app now"


def test_reload_shares_loaded_engines(chat: Guard):
    again = Guard.load(shipped_policy("values"), reuse=chat)
    assert [id(d) for d in again._detectors] == [id(d) for d in chat._detectors]


def test_is_thread_safe(chat: Guard):
    text = "bob@example.com, 4111 1111 1111 1111, +1 415-555-2671, password=hunter2Xy7q! " * 20
    expected = chat.check("answer", text, Session()).text
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.extend(chat.check("answer", text, Session()).text for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 20


# --- positions ------------------------------------------------------------------------------------------------------

HIDDEN = st.lists(st.integers(0, 30), max_size=8, unique=True).map(
    lambda edges: [(sorted(edges)[at], sorted(edges)[at + 1]) for at in range(0, len(edges) - 1, 2)]
)


def found_at(start: int, end: int, action: str = "redact") -> Finding:
    return Finding("pii", "A>_1", start, end, 1.0, "t", action=action)


@given(HIDDEN, st.integers(0, 15), st.data())
def test_what_is_found_in_a_redacted_text_is_where_it_was_sent(
    hidden: list[tuple[int, int]], cut: int, data: st.DataObject
):
    sent = [chr(0x4E00 + at) for at in range(31)]
    redactions = tuple(found_at(*span) for span in hidden)
    parts = redact_parts(["".join(sent[:cut]), "".join(sent[cut:])], redactions, Session())
    stands_for: list[range] = []  # of each character that is shown: what of the text that was sent
    done = 0
    for number, (start, end) in enumerate(hidden, 1):
        stands_for += [range(at, at + 1) for at in range(done, start)] + [range(start, end)] * len(f"<A>_1_{number}>")
        done = end
    stands_for += [range(at, at + 1) for at in range(done, 31)]
    assert len(stands_for) == len("".join(parts))
    first = data.draw(st.integers(0, len(stands_for) - 1))
    last = data.draw(st.integers(first, len(stands_for) - 1))
    ruling = Ruling((0, 1), Verdict("flag", ("pii",), (found_at(first, last + 1, "flag"),)))
    (moved,) = as_sent([ruling], [Ruling((0, 1), Verdict("redact", ("pii",), redactions))], parts)
    (finding,) = moved.verdict.findings
    assert (finding.start, finding.end) == (stands_for[first].start, stands_for[last].stop)
