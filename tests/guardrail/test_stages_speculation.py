"""The model starts before the verdict, and nothing it says is shown before: through the real process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import orjson
import pytest

from aim_guardrail.speculation import may_start
from fake_predictor import FakePredictor
from guarded import ask, eventually, metric, orders
from ports import free_ports
from scripted_guardrail import CHAT, Guarded, serving

POLICY = """
speculative: true
budget_ms: 20000
prompt:
  - {type: pii, action: redact}
  - {type: scripted, id: near, options: {name: near}, action: {BAD: block, WORSE: redact}}
"""


@pytest.fixture(scope="module")
def guarded(predictor: FakePredictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with serving(POLICY, tmp_path_factory.mktemp("speculation"), predictor.host) as guarded:
        yield guarded


@pytest.fixture
def fresh(guarded: Guarded, predictor: FakePredictor) -> Guarded:
    guarded.did()
    predictor.seen.clear()
    return guarded


def bodies(predictor: FakePredictor) -> list[Any]:
    return [orjson.loads(seen["body"])["messages"][0]["content"] for seen in predictor.seen]


def test_the_predictor_is_asked_while_the_check_runs(fresh: Guarded, predictor: FakePredictor):
    kept = fresh.grown("speculative", outcome="kept")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(fresh, "near=sleep:1.5", say="well")
        assert eventually(lambda: predictor.seen)
        assert fresh.did() == ["near asked"]
        assert answer.result().json()["choices"][0]["message"]["content"] == "well"
    assert fresh.did() == ["near answered"]
    assert (len(predictor.seen), kept()) == (1, 1)


def test_nothing_is_shown_before_the_verdict(fresh: Guarded, predictor: FakePredictor):
    told = orders(say="all is well")
    with httpx.stream(
        "POST", f"{fresh.server.url}{CHAT}", json=ask("near=sleep:1", stream=True), headers=told, timeout=30
    ) as answer:
        assert fresh.did() == ["near asked", "near answered"]  # by the first byte, which is the head's
        assert answer.read().count(b"well") == 1
    assert len(predictor.seen) == 1


@pytest.mark.parametrize("told", [{"say": "the forbidden answer"}, {"hang_after": -1}])
def test_what_is_blocked_is_dropped(fresh: Guarded, predictor: FakePredictor, told: dict[str, Any]):
    dropped = fresh.grown("speculative", outcome="dropped")
    answer = fresh("near=sleep:0.5 near=bad", **told)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filter")
    assert "forbidden" not in answer.text
    assert (len(predictor.seen), dropped()) == (1, 1)
    assert eventually(lambda: predictor.open == 0)
    assert metric(fresh.server, "guardrail_upstream_connections") == 0


def test_a_failure_is_dropped_too(fresh: Guarded, predictor: FakePredictor):
    assert fresh("near=sleep:0.3 near=fail", hang_after=-1).status_code == 503
    assert eventually(lambda: predictor.open == 0)


def test_what_is_redacted_is_asked_again(fresh: Guarded, predictor: FakePredictor):
    repeated = fresh.grown("speculative", outcome="repeated")
    answer = fresh("write bob@example.com near=sleep:0.5 near=worse")
    assert bodies(predictor) == [
        "write <EMAIL_ADDRESS_1> near=sleep:0.5 near=worse",
        "write <EMAIL_ADDRESS_1> near=sleep:0.5 <WORSE_1>",
    ]
    assert answer.json()["choices"][0]["message"]["content"] == bodies(predictor)[1]
    assert (answer.headers["x-guardrail-verdict"], repeated()) == ("redact", 1)
    ids = [dict(seen["headers"])["x-request-id"] for seen in predictor.seen]
    assert ids[1] == f"{ids[0]}-2"
    assert metric(fresh.server, "guardrail_upstream_connections") == 0


def test_keys_that_are_redacted_are_so_in_both(fresh: Guarded, predictor: FakePredictor):
    arguments = orjson.dumps({"bob@example.com": {"deep": "near=worse"}}).decode()
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "user", "content": "well"}]
    answer = httpx.post(f"{fresh.server.url}{CHAT}", json={"model": "m", "messages": messages}, timeout=30)
    assert answer.status_code == 200
    sent = [
        orjson.loads(orjson.loads(seen["body"])["messages"][0]["tool_calls"][0]["function"]["arguments"])
        for seen in predictor.seen
    ]
    assert sent == [{"<EMAIL_ADDRESS_1>": {"deep": "near=worse"}}, {"<EMAIL_ADDRESS_1>": {"deep": "<WORSE_1>"}}]


def test_a_client_that_leaves_takes_both_along(fresh: Guarded, predictor: FakePredictor):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{fresh.server.url}{CHAT}", json=ask("near=sleep:15"), headers=orders(hang_after=-1), timeout=0.7)
    assert predictor.seen
    assert eventually(lambda: predictor.open == 0)
    assert eventually(lambda: metric(fresh.server, "guardrail_upstream_connections") == 0)


def test_with_tools_nothing_is_sent_early(fresh: Guarded, predictor: FakePredictor):
    tools = [{"type": "function", "function": {"name": "pay", "parameters": {}}}]
    answer = httpx.post(f"{fresh.server.url}{CHAT}", json=ask("near=bad", tools=tools), timeout=30)
    assert answer.status_code == 400
    assert predictor.seen == []


def test_a_predictor_that_is_away(tmp_path_factory: pytest.TempPathFactory):
    nowhere = f"127.0.0.1:{free_ports(1)[0]}"
    with serving(POLICY, tmp_path_factory.mktemp("away"), nowhere) as guarded:
        assert guarded("near=sleep:0.3 near=bad").status_code == 400
        answer = guarded("well")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "predictor_unreachable")
        assert "never retrieved" not in guarded.server.stderr()


@pytest.mark.parametrize(
    ("endpoint", "body", "may"),
    [
        ("chat/completions", {"tools": []}, True),
        ("completions", {"prompt": "p"}, True),
        ("chat/completions", {"functions": [{"name": "f"}]}, False),
        ("chat/completions", {"web_search_options": {}}, False),
        ("chat/completions", {"store": True}, False),
        ("responses", {"input": "p"}, False),
        ("/v1/models/m:predict", {"instances": ["p"]}, False),
    ],
)
def test_only_what_changes_nothing_may_start(endpoint: str, body: dict[str, Any], may: bool):
    assert may_start(endpoint, body) is may
