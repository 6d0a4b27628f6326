"""Policies: strict, named errors, pure decisions."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scripted_detectors
from aim_guardrail.detectors.base import Finding
from aim_guardrail.detectors.families import FAMILIES
from aim_guardrail.policy import (
    Policy,
    PolicyError,
    Rule,
    Verdict,
    decide,
    load_policies,
    load_policy,
    parse_policy,
    shipped_policy,
)
from aim_guardrail.policy.policy import BUDGETS_MS
from aim_guardrail.policy.verdict import settle

GOOD = """\
version: 1
name: chat
on_error: open
prompt:
  - {type: secrets, action: block}
  - {type: pii, action: redact}
answer:
  - type: pii
    action: flag
    entities: [CREDIT_CARD, EMAIL_ADDRESS]
    threshold: 0.5
stream: {max_hold_chars: 2048, on_overflow: redact}
"""


def test_reads_every_field():
    policy = parse_policy(GOOD, "p.yaml")
    assert policy.on_error == "open"
    assert policy.prompt == (Rule(type="secrets", action="block"), Rule(type="pii", action="redact"))
    assert policy.rules("answer")[0].labels == {"CREDIT_CARD", "EMAIL_ADDRESS"}
    assert policy.stream.max_hold_chars == 2048


def test_fails_closed_by_default():
    policy = parse_policy("version: 1\nname: a\nprompt: [{type: pii, action: redact}]\n", "p.yaml")
    assert (policy.on_error, policy.stream.on_overflow) == ("closed", "block")


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("on_error: open", "on_eror: open", 3, "on_eror: unknown key"),
        ("on_error: open", "on_error: maybe", 3, "on_error: 'maybe' is not allowed: use 'closed' or 'open'"),
        ("version: 1\n", "", 1, "version: missing"),
        ("version: 1", "version: 3", 1, "version: 3 is not allowed: use 1 or 2"),
        ("version: 1", "version: yes", 1, "version: True is not allowed: use 1 or 2"),
        ("version: 1", "version: 1.0", 1, "version: 1.0 is not allowed: use 1 or 2"),
        ("name: chat", "name: Chat!", 2, "name: 'Chat!' is refused"),
        (
            "type: pii, action: redact",
            "type: pi, action: redact",
            6,
            "prompt[1].type: unknown type 'pi': use one of secrets",
        ),
        (
            "action: block",
            "action: drop",
            5,
            "prompt[0].action: 'drop' is not allowed: use 'block', 'redact', 'flag' or 'log'",
        ),
        ("EMAIL_ADDRESS]", "EMAIL]", 10, "answer[0].entities: unknown entity 'EMAIL': use some of CREDIT_CARD"),
        ("EMAIL_ADDRESS]", "CREDIT_CARD]", 10, "answer[0].entities: an entity is listed twice"),
        ("[CREDIT_CARD, EMAIL_ADDRESS]", "[]", 10, "answer[0].entities: "),
        ("threshold: 0.5", "threshold: 1.5", 11, "answer[0].threshold: 1.5 is refused"),
        ("threshold: 0.5", "threshold: high", 11, "answer[0].threshold: 'high' is refused"),
        ("CREDIT_CARD, EMAIL", "PHONE_NUMBER, EMAIL", 11, "answer[0].threshold: 0.5 can never match PHONE_NUMBER"),
        (
            "entities: [CREDIT_CARD, EMAIL_ADDRESS]",
            "#",
            11,
            "answer[0].threshold: 0.5 can never match PHONE_NUMBER, whose highest score is 0.4: lower it, or list the",
        ),
        (
            "action: block}",
            "action: block, threshold: 0.95}",
            5,
            "prompt[0].threshold: 0.95 can never match SECRET, whose highest score is 0.9: lower it",
        ),
        ("type: pii, action", "type: secrets, action", 4, "prompt: type 'secrets' appears twice"),
        ("max_hold_chars: 2048", "max_hold_chars: 1", 12, "stream.max_hold_chars: 1 is refused"),
        ("max_hold_chars: 2048", "hold: 1", 12, "stream.hold: unknown key"),
        ("name: chat", "name: chat\nname: two", 3, "name: given twice"),
        ("stream: {", "stream: {{", 13, "not valid YAML"),
        ("prompt:\n", "prompt: 3\nx:\n", 4, "prompt: 3 is refused"),
    ],
)
def test_errors_are_one_line_with_file_line_key_and_remedy(old: str, new: str, line: int, message: str):
    assert old in GOOD
    with pytest.raises(PolicyError) as caught:
        parse_policy(GOOD.replace(old, new, 1), "p.yaml")
    assert str(caught.value).startswith(f"p.yaml:{line}: {message}")
    assert "\n" not in str(caught.value)


HEAD = "version: 1\nname: a\n"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (HEAD + "prompt: &a [*a]\n", "p.yaml:3: an alias stands within what it refers to"),
        (HEAD + "prompt: &a\n  - {type: pii, action: &b {x: *a}}\n", "p.yaml:3: an alias stands within"),
        (HEAD + "stream: &a {<<: *a}\n", "p.yaml:3: an alias stands within"),
        (HEAD + "prompt: " + "[" * 3000 + "]" * 3000, "p.yaml:3: not valid YAML (nested deeper than 20 levels)"),
        (HEAD + "prompt: " + "{a: " * 3000 + "}" * 3000, "p.yaml:3: not valid YAML (nested deeper than 20 levels)"),
        (
            HEAD + "prompt:\n" + "\n".join(" " * i + "-" for i in range(1, 400)),
            "p.yaml:23: not valid YAML (nested deeper",
        ),
        (
            HEAD + "".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9) if i else 1}]\n" for i in range(12)),
            "p.yaml:7: more than 10000 values, aliases written out",
        ),
        (
            HEAD + "".join(f"x{i}: &x{i} {{<<: [{','.join([f'*x{i - 1}'] * 9) if i else ''}]}}\n" for i in range(12)),
            "p.yaml:7: more than 10000 values",
        ),
        (HEAD + "prompt: [" + "1," * 20_000 + "]", "p.yaml:3: more than 10000 values"),
        (HEAD + "# " + "x" * 300_000, "p.yaml: larger than 262144 characters"),
        (HEAD + "prompt:\n  - type: pii\n    type: secrets\n", "p.yaml:5: type: given twice: keep one"),
        (HEAD + '"a\\nb": 1\n"a\\nb": 2\n', "p.yaml:4: 'a\\nb': given twice: keep one"),
        (HEAD + "? [a, b]\n: c\n", "p.yaml:3: a key must be text: put it in quotes"),
        (HEAD + "1: c\n", "p.yaml:3: a key must be text"),
        (HEAD + "on: c\n", "p.yaml:3: a key must be text"),
        (HEAD + "~: c\n", "p.yaml:3: a key must be text"),
        ("version: 1\nname: 2024-13-45\n", "p.yaml:2: not valid YAML ('2024-13-45' is no timestamp)"),
        ("version: !!int x\n", "p.yaml:1: not valid YAML ('x' is no int)"),
        ("version: !!bool x\n", "p.yaml:1: not valid YAML ('x' is no bool)"),
        ("version: !!timestamp x\n", "p.yaml:1: not valid YAML ('x' is no timestamp)"),
        ("version: " + "1" * 5000 + "\n", "p.yaml:1: not valid YAML ('111"),
        ("version: !!python/name:os.system x\n", "p.yaml:1: not valid YAML (could not determine a constructor"),
        ("version: 1\n--- \nversion: 1\n", "p.yaml:2: not valid YAML (but found another document)"),
        ("version: \x00\n", "p.yaml: not valid YAML (unacceptable character #x0000"),
    ],
)
def test_no_text_is_a_traceback(source: str, says: str):
    with pytest.raises(PolicyError) as caught:
        parse_policy(source, "p.yaml")
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "on_error: open",
            "on-error: open",
            "p.yaml:3: on-error: unknown key: did you mean 'on_error'?; known: version",
        ),
        ("on_error: open", "On_Error: open", "p.yaml:3: On_Error: unknown key: did you mean 'on_error'?"),
        (
            "threshold:",
            "treshold:",
            "p.yaml:11: answer[0].treshold: unknown key: did you mean 'threshold'?; known: type",
        ),
        ("max_hold_chars", "hold_chars", "p.yaml:12: stream.hold_chars: unknown key: did you mean 'max_hold_chars'?"),
        ("on_error: open", "colour: red", "p.yaml:3: colour: unknown key: remove it; known: version, name, tenant"),
        (
            "action: block",
            "action: blok",
            "p.yaml:5: prompt[0].action: 'blok' is not allowed: use 'block', 'redact', 'flag' or",
        ),
        ("action: block", "action: blok", "did you mean 'block'?"),
        ("type: secrets", "type: secret", "did you mean 'secrets'?"),
        ("EMAIL_ADDRESS", "email_address", "did you mean 'EMAIL_ADDRESS'?"),
        (
            "type: secrets",
            "type: [secrets]",
            "p.yaml:5: prompt[0].type: ['secrets'] is refused: input should be a valid",
        ),
        (
            "threshold: 0.5",
            "threshold: '0.5'",
            "p.yaml:11: answer[0].threshold: '0.5' is refused: input should be a valid",
        ),
        (
            "max_hold_chars: 2048",
            "max_hold_chars: 1.5",
            "p.yaml:12: stream.max_hold_chars: 1.5 is refused: input should",
        ),
        (
            "  - {type: secrets, action: block}",
            "  - secrets",
            "p.yaml:5: prompt[0]: 'secrets' is refused: input should be a map",
        ),
        (
            "stream: {max_hold_chars: 2048, on_overflow: redact}",
            "stream: redact",
            "p.yaml:12: stream: 'redact' is refused: inp",
        ),
        ("version: 1", "version: '1'", "p.yaml:1: version: '1' is not allowed: use 1 or 2"),
        ("on_error: open", "on_error: off", "p.yaml:3: on_error: False is not allowed: use 'closed' or 'open'"),
    ],
)
def test_what_was_meant_is_named(old: str, new: str, says: str):
    assert old in GOOD
    with pytest.raises(PolicyError) as caught:
        parse_policy(GOOD.replace(old, new, 1), "p.yaml")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_and_merges_are_fine():
    shared = "answer: &rules [{type: pii, action: redact}]\nprompt: *rules\nstream: {<<: {max_hold_chars: 99}}\n"
    policy = parse_policy(HEAD + shared, "p.yaml")
    assert policy.prompt == policy.answer
    assert policy.stream.max_hold_chars == 99


@given(st.text(st.sampled_from("{}[]&*!|>-:,?#'\"\n a1<~%@\t")), st.booleans())
def test_any_text_is_a_policy_or_one_line(text: str, headed: bool):
    try:
        parse_policy(GOOD + text if headed else text, "p.yaml")
        said = ""
    except PolicyError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize("source", ["", "[]", "3", "version: 1\nname: nothing\n"])
def test_refuses_what_is_no_policy(source: str):
    with pytest.raises(PolicyError, match=r"^p\.yaml:1: "):
        parse_policy(source, "p.yaml")


def test_names_the_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(PolicyError, match=r"none\.yaml: cannot be read \(No such file"):
        load_policy(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(PolicyError, match="not UTF-8"):
        load_policy(tmp_path / "latin.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")  # whoever opens one waits for a writer
    with pytest.raises(PolicyError, match="pipe or device"):
        load_policy(tmp_path / "pipe.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * 2**21)
    with pytest.raises(PolicyError, match="larger than"):
        load_policy(tmp_path / "huge.yaml")
    with pytest.raises(PolicyError, match=r"cannot be read \(File name too long"):
        load_policies("x" * 5000)


def test_loads_from_a_file(tmp_path: Path):
    (tmp_path / "p.yaml").write_text(GOOD)
    assert load_policy(tmp_path / "p.yaml").name == "chat"


def test_every_shipped_policy_is_valid():
    folder = Path(__file__).parents[2] / "transformers/aim_guardrail/policies"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    assert names == ["batch", "chat", "codegen", "rag", "values"]
    assert [shipped_policy(name).name for name in names] == names
    with pytest.raises(PolicyError, match="no shipped policy is named 'chatt': use one of batch, chat, codegen"):
        shipped_policy("chatt")


def test_the_policy_of_values_blocks_secrets_in_prompts_and_redacts_the_rest():
    actions = {(d, r.type): r.action for d in ("prompt", "answer") for r in shipped_policy("values").rules(d)}  # type: ignore[arg-type]
    assert actions == {
        ("prompt", "secrets"): "block",
        ("prompt", "pii"): "redact",
        ("answer", "secrets"): "redact",
        ("answer", "pii"): "redact",
    }


def test_the_version_hash_follows_the_meaning_not_the_spelling():
    base = parse_policy(GOOD, "a").version_hash
    respelled = "# a comment\n" + GOOD.replace("{type: secrets, action: block}", "{action: block, type: secrets}")
    assert base == parse_policy(respelled, "b").version_hash
    assert base != parse_policy(GOOD.replace("0.5", "0.6"), "c").version_hash
    assert len(base) == 12


def finding(start: int, end: int, family: str = "pii", label: str = "EMAIL_ADDRESS", score: float = 1.0) -> Finding:
    return Finding(family, label, start, end, score, "test")


def to_redact(*found: Finding) -> tuple[Finding, ...]:
    return tuple(each._replace(action="redact") for each in found)


REDACT_ALL = (Rule(type="secrets", action="redact"), Rule(type="pii", action="redact"))


def test_nothing_found_is_allowed():
    assert decide([], REDACT_ALL) == Verdict()


def test_the_strictest_action_wins():
    rules = (Rule(type="secrets", action="block"), Rule(type="pii", action="flag"))
    both = [finding(0, 5), finding(9, 12, "secrets", "SECRET", 0.9)]
    assert decide(both, rules).action == "block"
    assert decide(both, rules).families == ("secrets", "pii")
    assert decide(both[:1], rules).action == "flag"


def test_labels_and_thresholds_decide_what_counts():
    phone = finding(0, 9, label="PHONE_NUMBER", score=0.4)
    bare = finding(20, 29, label="PHONE_NUMBER", score=0.3)
    assert decide([phone, bare], REDACT_ALL).findings == to_redact(phone)
    lower = (Rule(type="pii", action="redact", threshold=0.3),)
    assert decide([phone, bare], lower).findings == to_redact(phone, bare)
    assert decide([phone], (Rule(type="pii", action="redact", entities=("US_SSN",)),)) == Verdict()
    assert decide([phone], (Rule(type="secrets", action="redact"),)) == Verdict()


def test_overlapping_findings_become_one_that_covers_all():
    secret, mail = finding(10, 20, "secrets", "SECRET", 0.6), finding(15, 30)
    assert decide([mail, secret], REDACT_ALL).findings == to_redact(finding(10, 30, "secrets", "SECRET", 0.6))
    card, phone = finding(0, 16, label="CREDIT_CARD"), finding(12, 24, label="PHONE_NUMBER", score=0.4)
    assert decide([phone, card], REDACT_ALL).findings == to_redact(finding(0, 24, label="CREDIT_CARD"))


def test_a_flag_never_widens_or_hides_a_redaction():
    rules = (Rule(type="secrets", action="flag"), Rule(type="pii", action="redact"))
    secret, mail = finding(0, 40, "secrets", "SECRET", 0.9), finding(15, 30)
    verdict = decide([secret, mail], rules)
    assert (verdict.action, verdict.findings) == ("redact", to_redact(mail))


@given(
    st.lists(
        st.builds(
            lambda start, size, family: finding(start, start + size, family, next(iter(FAMILIES[family].labels)), 1.0),
            st.integers(0, 50),
            st.integers(1, 20),
            st.sampled_from(sorted(rule.type for rule in REDACT_ALL)),
        ),
        max_size=12,
    )
)
def test_what_is_redacted_is_exactly_what_was_found(findings: list[Finding]):
    verdict = decide(findings, REDACT_ALL)
    found = {i for f in findings for i in range(f.start, f.end)}
    kept = [i for f in verdict.findings for i in range(f.start, f.end)]
    assert len(kept) == len(set(kept))
    assert set(kept) == found


def test_many_findings_cost_no_more_than_their_number():
    def cpu_s(values: int) -> float:
        found = [
            Finding(
                "pii", "X", 20 * at + 9 * weak, 20 * at + 9 * weak + 5, 1.0, "r", action="flag" if weak else "redact"
            )
            for at in range(values)
            for weak in (False, True)
        ]
        start = time.process_time()
        assert len(settle(found).findings) == 2 * values
        return time.process_time() - start

    once = min(cpu_s(500) for _ in range(3))
    assert min(cpu_s(8_000) for _ in range(2)) < 4 * 16 * once


def test_verdicts_join():
    one = decide([finding(0, 3)], (Rule(type="pii", action="flag"),))
    two = decide([finding(5, 8, "secrets", "SECRET", 0.9)], REDACT_ALL, degraded=("pii",))
    joined = one.joined(two)
    assert (joined.action, joined.families, joined.degraded) == ("redact", ("secrets", "pii"), ("pii",))
    assert joined.findings == one.findings + two.findings
    assert Verdict().joined(one) == one == one.joined(Verdict())


def test_a_policy_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        shipped_policy("values").name = "other"  # type: ignore[misc]
    assert isinstance(hash(shipped_policy("values").prompt), int)
    assert Policy.model_fields.keys() >= {"version", "name", "on_error", "prompt", "answer", "stream"}


TWO = """\
version: 2
name: all
tenant: acme
use_case: rag
budget_ms: 80
on_timeout: open
prompt:
  - {type: pii, action: {CREDIT_CARD: block, EMAIL_ADDRESS: redact, default: log}}
  - {type: secrets, id: keys, action: block}
answer:
  - {type: pii, action: {CREDIT_CARD: redact}, threshold: {CREDIT_CARD: 0.9}}
stream: {mode: observe, max_hold_ms: 50}
"""


def test_version_2_has_an_action_for_each_label():
    policy = parse_policy(TWO, "p.yaml")
    first, keys = policy.rules("prompt")
    assert (policy.tenant, policy.budget_s, policy.on_timeout, policy.stream.mode) == ("acme", 0.08, "open", "observe")
    assert [first.action_on(label) for label in ("CREDIT_CARD", "EMAIL_ADDRESS", "US_SSN")] == [
        "block",
        "redact",
        "log",
    ]
    assert (keys.name, first.name) == ("keys", "pii")
    assert policy.rules("answer")[0].labels == {"CREDIT_CARD"}
    assert policy.rules("answer")[0].applies(finding(0, 9, label="CREDIT_CARD", score=0.9))


def test_a_budget_is_its_use_cases_by_default():
    budgets = [
        parse_policy(TWO.replace("budget_ms: 80\n", "").replace("rag", name), "p").budget_s for name in BUDGETS_MS
    ]
    assert budgets == [0.1, 0.15, 0.2, 0.5]


def test_a_verdict_has_each_labels_own_action_and_logs_without_a_word():
    rules = parse_policy(TWO, "p.yaml").rules("prompt")
    mail, ssn = finding(0, 9), finding(12, 20, label="US_SSN", score=0.5)
    verdict = decide([mail, ssn], rules)
    assert (verdict.action, [f.action for f in verdict.findings]) == ("redact", ["redact", "log"])
    only_logged = decide([ssn], rules)
    logged = ssn._replace(action="log")
    assert (only_logged.action, only_logged.families, only_logged.findings) == ("allow", (), (logged,))
    assert decide([finding(0, 16, label="CREDIT_CARD")], rules).blocked


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("version: 2", "version: 1", 1, "policy: tenant is new in version 2: say 'version: 2'"),
        ("CREDIT_CARD: block", "CARD: block", 8, "prompt[0].action: unknown entity 'CARD': use some of CREDIT_CARD"),
        (
            "CREDIT_CARD: block",
            "CREDIT_CARD: drop",
            8,
            "prompt[0].action.CREDIT_CARD: 'drop' is not allowed: use 'block'",
        ),
        ("{CREDIT_CARD: 0.9}", "{CRYPTO: 2}", 11, "answer[0].threshold.CRYPTO: 2 is refused"),
        ("{CREDIT_CARD: 0.9}", "{PHONE_NUMBER: 0.9}", 11, "answer[0].threshold: 0.9 can never match PHONE_NUMBER"),
        ("id: keys", "id: pii", 7, "prompt: 'pii' appears twice: give each rule an id of its own"),
        ("id: keys", "timeout_ms: 5", 9, "prompt[1]: type 'secrets' is checked inline and cannot time out"),
        ("id: keys", "options: {a: 1}", 9, "prompt[1].options: a: unknown key: remove it"),
        ("type: secrets, id: keys, action: block", "parallel: []", 9, "prompt[1]: a stage has rules under parallel or"),
        (
            "{type: secrets, id: keys, action: block}",
            "parallel: [{type: secrets, action: block}]",
            7,
            "prompt: type 'secrets' is checked inline, before any stage: put it outside the stage",
        ),
        ("name: all", "name: all\n1[: 2", 3, "1[: unknown key: remove it"),
        ("name: all", "name: all\nrule: 2", 3, "rule: unknown key"),
        ("id: keys", "stage: 1", 9, "prompt[1].stage: unknown key"),
        ("mode: observe", "mode: peek", 12, "stream.mode: 'peek' is not allowed: use 'holdback', 'buffer'"),
        ("use_case: rag", "use_case: fun", 4, "use_case: 'fun' is not allowed: use 'chat', 'rag'"),
    ],
)
def test_errors_of_version_2_name_the_place_too(old: str, new: str, line: int, message: str):
    assert old in TWO
    with pytest.raises(PolicyError) as caught:
        parse_policy(TWO.replace(old, new, 1), "p.yaml")
    assert str(caught.value).startswith(f"p.yaml:{line}: {message}")
    assert "\n" not in str(caught.value)


def test_the_hash_changes_with_a_rules_options_and_an_action_for_each_label_names_its_detector(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(FAMILIES, "scripted", scripted_detectors.FAMILY)
    rule = "{type: scripted, action: {BAD: block}, options: {name: %s}}"
    one, other = (parse_policy(f"version: 2\nname: p\nprompt: [{rule % name}]", "p") for name in "ab")
    assert one.version_hash != other.version_hash
    assert hash(one.rules("prompt")[0].wanted) != hash(other.rules("prompt")[0].wanted)
    assert one.rules("prompt")[0].labels == {"BAD"}
