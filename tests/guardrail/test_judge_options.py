"""What a policy may say of judges, and what it is told when it is wrong."""

from __future__ import annotations

from textwrap import indent

import pytest

from aim_guardrail.detectors.families import FAMILIES, Wanted, build_detector
from aim_guardrail.policy import Policy, parse_policy
from aim_guardrail.policy.source import PolicyError

REMOTE = "endpoint: http://guard:8080/v1\nmodel: guard\n"
RULES = "rules:\n- {id: NO_ADVICE, description: gives legal advice, violations: [Sue them!], fine: [Ask a lawyer.]}\n"


def policy(family: str, options: str, more: str = "action: block") -> Policy:
    text = f"version: 2\nname: t\nprompt:\n- type: {family}\n  {more}\n  options:\n{indent(options, '    ')}"
    return parse_policy(text, "p.yaml")


def test_a_guard_s_labels_are_its_version_s():
    def labels(judge: str, more: str = "") -> set[str]:
        return set(policy("safety", f"judge: {judge}\n{REMOTE}{more}").prompt[0].known)  # type: ignore[union-attr]

    assert "CODE_INTERPRETER_ABUSE" in labels("llama-guard-3")
    assert labels("llama-guard-3") - labels("llama-guard-3-1b") == {"CODE_INTERPRETER_ABUSE"}
    assert labels("llama-guard-3-1b") - labels("llama-guard-2") == {"DEFAMATION", "ELECTIONS"}
    assert labels("granite-guardian-3.2") == {"HARM"}
    assert labels("granite-guardian-3.3", "risks: [harm, jailbreak]\n") == {"HARM", "JAILBREAK"}


def test_written_rules_are_labels():
    rule = policy("compliance", REMOTE + RULES, "action: {NO_ADVICE: flag}").prompt[0]
    assert rule.labels == {"NO_ADVICE"}  # type: ignore[union-attr]
    with pytest.raises(
        PolicyError, match="unknown entity 'NO_ADVISE': use some of NO_ADVICE: did you mean 'NO_ADVICE'"
    ):
        policy("compliance", REMOTE + RULES, "action: {NO_ADVISE: flag}")


def test_what_is_wanted_can_be_a_key():
    one, other = (policy("compliance", REMOTE + RULES).prompt[0].wanted for _ in range(2))  # type: ignore[union-attr]
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("safety", REMOTE, "judge: missing: add it"),
        ("safety", f"judge: llama-guard-4\n{REMOTE}", "judge: 'llama-guard-4' is not allowed: use 'llama-guard-2',"),
        ("safety", "judge: llama-guard-3", "a judge runs at an endpoint or from a path: give one of them"),
        ("safety", f"judge: llama-guard-3\npath: /m.gguf\n{REMOTE}", "give one of them"),
        ("safety", "judge: llama-guard-3\npath: /m.gguf\nmodel: m", "model is a server's: remove it"),
        ("safety", "judge: llama-guard-3\nendpoint: http://guard/v1", "model is missing: give the name"),
        ("safety", "judge: llama-guard-3\nendpoint: guard\nmodel: m", "endpoint: 'guard' is no address of a server"),
        ("safety", f"judge: llama-guard-3\nthreads: 2\n{REMOTE}", "threads are for path: remove them"),
        ("safety", f"judge: llama-guard-3\nrisks: [harm]\n{REMOTE}", "risks are Granite Guardian's"),
        ("safety", f"judge: granite-guardian-3.1\nrisks: [hate]\n{REMOTE}", "unknown risk 'hate': use some of harm,"),
        ("safety", f"judge: granite-guardian-3.1\nrisks: [harm, harm]\n{REMOTE}", "a risk is listed twice"),
        ("safety", f"judge: llama-guard-3\ncontext_tokens: 100\n{REMOTE}", "context_tokens: 100 is refused"),
        ("safety", f"judge: llama-guard-3\ntemperature: 1\n{REMOTE}", "temperature: unknown key"),
        ("compliance", REMOTE, "rules: missing: add it"),
        ("compliance", f"{REMOTE}rules: []", r"rules: .* at least 1"),
        ("compliance", f"{REMOTE}rules: [{{id: A}}]", r"rules.0.description: missing: add it"),
        (
            "compliance",
            f"{REMOTE}rules: [{{id: A, description: d, exmples: [x]}}]",
            "unknown key 'exmples' in a rule; kno",
        ),
        ("compliance", f"{REMOTE}rules: [{{id: 'a b', description: d}}]", r"rules.0.id: 'a b' is no id: use a letter"),
        (
            "compliance",
            f"{REMOTE}rules: [{{id: A, description: d}}, {{id: A, description: e}}]",
            "id 'A' is given twice",
        ),
        ("compliance", f"{REMOTE}rules: [{{id: A, description: d, fine: ['']}}]", "rules.0.fine: an example is a text"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_remedy(family: str, options: str, said: str):
    with pytest.raises(PolicyError, match=said) as refused:
        policy(family, options)
    assert str(refused.value).startswith("p.yaml:")
    assert "\n" not in str(refused.value)


def test_rules_that_leave_no_room_are_refused_when_they_are_loaded():
    many = "rules:\n" + "".join(f"- {{id: R{at}, description: '{'x' * 200}'}}\n" for at in range(30))
    wanted: Wanted = policy("compliance", f"{REMOTE}context_tokens: 2048\n{many}").prompt[0].wanted  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="context_tokens 2048 leave no room for a text: raise them"):
        build_detector("compliance", wanted)


def test_a_file_that_is_not_there_is_named():
    wanted: Wanted = policy("safety", "judge: llama-guard-3\npath: /nowhere.gguf").prompt[0].wanted  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"path /nowhere\.gguf: no such file"):
        build_detector("safety", wanted)
    keyed = policy("safety", f"judge: llama-guard-3\napi_key_file: /nowhere\n{REMOTE}").prompt[0].wanted  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="api_key_file /nowhere: cannot be read"):
        build_detector("safety", keyed)


def test_judges_are_asked_behind_the_inline_stage():
    assert {FAMILIES["safety"].kind, FAMILIES["compliance"].kind} == {"batch"}
