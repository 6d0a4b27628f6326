"""The asynchronous stages through the real process: order, early stop, budgets, failures, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fake_predictor import FakePredictor
from guarded import ask, eventually, metric
from scripted_guardrail import CHAT, Guarded, serving

POLICY = """
use_case: rag
budget_ms: 1500
prompt:
  - parallel:
      - {type: scripted, id: near, options: {name: near}, action: {BAD: block, WORSE: redact}}
      - {type: scripted, id: far, options: {name: far, cost: remote}, action: block, on_timeout: open, on_error: open}
  - sequential:
      - {type: scripted, id: first, options: {name: first}, action: flag}
      - {type: scripted, id: second, options: {name: second}, action: block, timeout_ms: 100}
answer:
  - {type: scripted, id: late, options: {name: late}, action: {BAD: block, WORSE: redact}}
"""
MUST = """
budget_ms: 400
on_timeout: open
on_error: open
prompt: [{type: scripted, id: must, options: {name: must, cost: remote}, action: block, required: true}]
"""


@pytest.fixture(scope="module")
def guarded(predictor: FakePredictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with serving(POLICY, tmp_path_factory.mktemp("stages"), predictor.host) as guarded:
        yield guarded


@pytest.fixture
def fresh(guarded: Guarded) -> Guarded:
    guarded.did()
    return guarded


def test_side_by_side_then_in_turn(fresh: Guarded):
    assert fresh("well").status_code == 200
    done = fresh.did()
    assert sorted(done[:4]) == ["far answered", "far asked", "near answered", "near asked"]
    assert done[4:] == [
        "first asked",
        "first answered",
        "second asked",
        "second answered",
        "late asked",
        "late answered",
    ]


def test_a_block_cancels_the_rest_at_once(fresh: Guarded, predictor: FakePredictor):
    seen, skipped = len(predictor.seen), fresh.grown("skipped", reason="early_stop")
    late = fresh.grown("timeouts")
    answer = fresh("near=bad far=sleep:30")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filter")
    assert answer.json()["error"]["param"] == "messages[0].content"
    assert answer.headers["x-guardrail-verdict"] == "block"
    assert sorted(fresh.did()) == ["far asked", "far cancelled", "near answered", "near asked"]
    assert (skipped(), late()) == (3, 0)
    assert fresh.count("skipped", detector="second", reason="early_stop") >= 1
    assert len(predictor.seen) == seen


def test_each_label_has_its_action_in_both_directions(fresh: Guarded, predictor: FakePredictor):
    answer = fresh("say near=worse first=bad", say="so late=worse !")
    assert answer.status_code == 200
    assert answer.headers["x-guardrail-verdict"] == "redact"
    assert predictor.last["body"].count(b"say <WORSE_1> first=bad") == 1
    assert answer.json()["choices"][0]["message"]["content"] == "so <WORSE_2> !"
    assert fresh("well", say="late=bad").status_code == 400


def test_late_and_open_passes_and_says_so(fresh: Guarded):
    late = fresh.grown("timeouts", detector="far", outcome="open")
    exceeded = fresh.grown("budget_exceeded", use_case="rag")
    answer = fresh("far=sleep:30 second=sleep:30")
    assert late() == 1
    assert exceeded() == 1
    # nothing was left for those behind: closed, and not called a block
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guardrail_budget")
    assert "'first'" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
    assert (
        fresh.did() == ["near asked", "near answered", "far asked", "far cancelled"] or "far cancelled" in fresh.did()
    )
    assert fresh.count("skipped", detector="first", reason="budget") >= 1
    assert fresh.count("requests", direction="prompt", use_case="rag", decision="timeout") >= 1


def test_a_timeout_of_its_own(fresh: Guarded):
    late = fresh.grown("timeouts", detector="second", outcome="closed")
    exceeded = fresh.grown("budget_exceeded")
    answer = fresh("second=sleep:30")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guardrail_timeout")
    assert (late(), exceeded()) == (1, 1)
    assert fresh.did()[-2:] == ["second asked", "second cancelled"]


def test_an_answer_has_the_whole_budget_for_itself(fresh: Guarded):
    assert fresh("well near=sleep:0.9", say="late=sleep:0.9").status_code == 200


def test_errors_as_the_policy_says(fresh: Guarded):
    answer = fresh("far=fail")
    assert (answer.status_code, answer.headers["x-guardrail-degraded"]) == (200, "far")
    answer = fresh("near=fail")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guardrail_failed")
    assert "business" not in answer.text + fresh.server.stderr()
    assert fresh.count("errors", detector="far", reason="degraded") >= 1
    assert fresh.count("errors", detector="near", reason="closed") >= 1


def test_misconfigured_is_closed_whatever_the_policy_says(fresh: Guarded):
    answer = fresh("far=denied")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guardrail_misconfigured")
    assert "401" not in answer.text
    assert "detector far is misconfigured: the judge answers 401: give its key" in fresh.server.stderr()
    assert fresh.count("errors", detector="far", reason="misconfigured") >= 1


def test_garbage_is_an_error(fresh: Guarded):
    assert fresh("near=garbage").status_code == 503


def test_an_open_breaker_is_an_error_and_closes_again(fresh: Guarded):
    skipped = fresh.grown("skipped", detector="far", reason="breaker")
    for _ in range(5):
        assert fresh("far=fail").headers["x-guardrail-degraded"] == "far"
    fresh.did()
    answer = fresh("far=bad")  # nobody looks, and the policy lets that pass
    assert (answer.status_code, answer.headers["x-guardrail-degraded"]) == (200, "far")
    assert "far asked" not in fresh.did()
    assert skipped() == 1
    assert eventually(lambda: fresh("far=bad").status_code == 400, within_s=10)


def test_what_is_slow_of_late_is_skipped_and_asked_again(predictor: FakePredictor, tmp_path: Path):
    policy = "prompt: [{type: scripted, options: {name: d}, action: block, timeout_ms: 60, on_timeout: open}]\n"
    with serving(f"budget_ms: 60000\n{policy}", tmp_path, predictor.host) as guarded:
        answers = [guarded("d=sleep:30") for _ in range(9)]
        assert {answer.headers["x-guardrail-degraded"] for answer in answers} == {"scripted"}
        assert guarded.count("skipped", detector="scripted", reason="budget") >= 1
        assert eventually(lambda: guarded("d=bad").status_code == 400)


def test_required_never_opens(predictor: FakePredictor, tmp_path: Path):
    with serving(MUST, tmp_path, predictor.host) as guarded:
        assert guarded("must=sleep:30").json()["error"]["code"] == "guardrail_timeout"
        for _ in range(4):
            assert guarded("must=fail").json()["error"]["code"] == "guardrail_failed"
        assert guarded("well").json()["error"]["code"] == "guardrail_failed"  # its breaker is open
        assert guarded.count("skipped", detector="must", reason="breaker") == 1
        assert guarded.count("timeouts", detector="must", outcome="closed") == 1


def test_a_client_that_leaves_takes_its_checks_along(fresh: Guarded):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{fresh.server.url}{CHAT}", json=ask("near=sleep:30"), timeout=0.3)
    assert eventually(lambda: "near cancelled" in fresh.did())
    assert fresh("well").status_code == 200


def test_threads_that_run_on_are_counted(fresh: Guarded):
    assert fresh("second=thread:1.5").json()["error"]["code"] == "guardrail_timeout"
    assert metric(fresh.server, "guardrail_abandoned_calls") == 1
    assert eventually(lambda: metric(fresh.server, "guardrail_abandoned_calls") == 0)


def test_v1_and_v2_are_judged_by_the_same_stages(fresh: Guarded):
    for path, body in {
        "/v1/models/m:predict": {"instances": ["near=bad"]},
        "/v2/models/m/infer": {
            "inputs": [{"name": "p", "datatype": "BYTES", "shape": [1], "data": ["near=bad"]}],
        },
    }.items():
        assert httpx.post(f"{fresh.server.url}{path}", json=body).status_code == 400
    assert "near answered" in fresh.did()
