"""``/filter``: the policy in force for whoever has no predictor behind it, over a real process of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

import word_family  # noqa: F401  a batch detector
from aim_guardrail.filter_api import MOST_ITEMS, Item, Judged, document, judge
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.blocked import Blocked
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import parse_policy
from aim_guardrail.settings import GuardrailSettings
from aim_guardrail.slots.slot import Slot, Slots
from aim_kserve.settings import SettingsError
from guarded import ask, metric
from served import Served

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is missing: it comes with the extra dev")
conformance = pytest.importorskip("schemathesis.specs.openapi.checks")

KEY = "AK" + "IAQ3EGRBL7JX2VWP5M"
FUZZED = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "8")),
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
schema = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def alone() -> Iterator[Served]:
    """No predictor: nothing but /filter."""
    with Served(["-m", "aim_guardrail", "--model_name", "m", "--policy", "values"]) as server:
        yield server
        assert "Traceback" not in server.stderr()


@pytest.fixture
def http(alone: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=alone.url, timeout=20) as client:
        yield client


def judged(http: httpx.Client, **item: Any) -> dict[str, Any]:
    answer = http.post("/filter", json=item)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_text_is_redacted_and_told_where(http: httpx.Client):
    found = judged(http, text="mail bob@example.com")
    assert (found["action"], found["text"], found["families"]) == ("redact", "mail <EMAIL_ADDRESS_1>", ["pii"])
    assert [(f["label"], f["action"], f["start"], f["end"]) for f in found["findings"]] == [
        ("EMAIL_ADDRESS", "redact", 5, 20)
    ]
    assert (found["policy"], len(found["version"])) == ("values", 12)


def test_a_block_is_an_answer_without_a_text(http: httpx.Client):
    answer = http.post("/filter", json={"text": f"use {KEY}"})
    assert (answer.status_code, answer.json()["action"], answer.json()["text"]) == (200, "block", None)
    assert KEY not in answer.text


def test_an_answer_is_judged_by_the_answers_rules(http: httpx.Client):
    found = judged(http, text=f"use {KEY}", direction="answer", prompt="which key?")
    assert (found["action"], found["text"]) == ("redact", "use <SECRET_1>")


def test_what_passes_comes_back_as_it_came(http: httpx.Client):
    text = "na\u00efve caf\u00e9 \U0001f600 \n\t"
    found = judged(http, text=text)
    assert (found["action"], found["text"], found["findings"]) == ("allow", text, [])
    assert judged(http, text="")["text"] == ""


def test_a_batch_is_judged_each_for_itself_in_its_order(http: httpx.Client):
    items = [{"text": f"{at}: bob{at}@example.com"} for at in range(20)] + [{"text": KEY}, {"text": "fine"}]
    results = http.post("/filter/batch", json={"items": items}).json()["results"]
    assert [r["text"] for r in results] == [*(f"{at}: <EMAIL_ADDRESS_1>" for at in range(20)), None, "fine"]


def test_it_is_counted_as_any_check(alone: Served, http: httpx.Client):
    before = metric(alone, "guardrail_requests_total", direction="prompt", decision="block")
    judged(http, text=KEY)
    assert metric(alone, "guardrail_requests_total", direction="prompt", decision="block") == before + 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not valid JSON"),
        (b"[]", "the body must be a JSON object"),
        (b"{}", "text: field required"),
        (b'{"text": 1}', "text: input should be a valid string"),
        (b'{"text": "a", "txt": "b"}', "txt: unknown field: known: text, direction, role, prompt"),
        (b'{"text": "a", "direction": "up"}', "direction: input should be 'prompt' or 'answer'"),
        (b'{"text": "a", "role": "a b"}', "role: string should match pattern"),
    ],
)
def test_what_is_malformed_is_named(body: bytes, message: str, http: httpx.Client):
    answer = http.post("/filter", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert answer.json()["error"]["message"].startswith(message)


def test_a_batch_is_bounded_and_its_fields_named(http: httpx.Client):
    many = http.post("/filter/batch", json={"items": [{"text": "a"}] * (MOST_ITEMS + 1)})
    assert (many.status_code, many.json()["error"]["param"]) == (400, "items")
    wrong = http.post("/filter/batch", json={"items": [{"text": "a"}, {"text": None}]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "items[1].text")


def test_other_methods_and_kinds_are_refused(http: httpx.Client):
    assert (http.get("/filter").status_code, http.get("/filter").headers["allow"]) == (405, "POST")
    compressed = http.post("/filter", content=b"{}", headers={"content-encoding": "gzip"})
    assert compressed.status_code == 415


def test_it_is_served_under_v1_too_and_described(http: httpx.Client):
    assert http.post("/v1/filter", json={"text": "hi"}).json()["action"] == "allow"
    assert set(http.get("/filter/openapi.json").json()["paths"]) == {"/filter", "/filter/batch"}


def test_without_a_predictor_nothing_else_is_served(http: httpx.Client):
    for path in ("/v1/chat/completions", "/v1/models/m:predict", "/v2/models/m/infer", "/anything"):
        answer = http.post(path, json=ask("hi"))
        assert answer.status_code == 404, path
        assert "has no predictor (--predictor_host)" in answer.text
    assert http.get("/v2/health/ready").status_code == 200


def test_settings_of_a_predictor_need_one():
    with pytest.raises(SettingsError, match="predictor_use_ssl is of a predictor, and there is no predictor_host"):
        GuardrailSettings.load(["--model_name", "m", "--predictor_use_ssl"], prog="x", description="")


def test_it_stands_before_a_predictor_as_well(client: httpx.Client):
    assert client.post("/filter", json={"text": "mail bob@example.com"}).json()["text"] == "mail <EMAIL_ADDRESS_1>"


def test_a_direction_without_rules_is_refused(tmp_path: Path):
    (tmp_path / "p.yaml").write_text("version: 1\nname: one\nprompt: [{type: pii, action: redact}]\n")
    with Served(["-m", "aim_guardrail", "--model_name", "m", "--policy", str(tmp_path / "p.yaml")]) as server:
        answer = httpx.post(f"{server.url}/filter", json={"text": "a", "direction": "answer"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "direction")


# --- positions ------------------------------------------------------------------------------------------------------

STAGED = """
version: 2
name: staged
budget_ms: 20000
prompt:
  - {type: pii, action: redact}
  - {type: words, action: {BAD: redact, MILD: %s}}
"""
VALUES = {
    "EMAIL_ADDRESS": "zoe.o@example.com",
    "CREDIT_CARD": "4111 1111 1111 1111",
    "BAD": "badword",
    "MILD": "mildword",
}
BETWEEN = st.sampled_from([" ", " na\u00efve \U0001f600 ", " \u200b \uff21\uff22 ", " e\u0301t\u00e9, ", "\n\n"])


@pytest.fixture(scope="module")
def staged() -> Guard:
    return Guard.load(parse_policy(STAGED % "flag", "t"))


def screening(guard: Guard) -> Screening:
    return Screening(guard, Metrics(CollectorRegistry()), RequestContext("/filter"))


def judged_here(guard: Guard, text: str) -> Judged:
    return asyncio.run(judge(screening(guard), Item(text=text)))


@settings(max_examples=100)
@given(st.lists(st.tuples(BETWEEN, st.sampled_from(sorted(VALUES))), max_size=8), BETWEEN)
def test_positions_are_those_of_the_text_that_was_sent(staged: Guard, said: list[tuple[str, str]], end: str):
    text = "".join(between + VALUES[label] for between, label in said) + end
    found = judged_here(staged, text).findings
    assert [(f.label, text[f.start : f.end]) for f in found if f.family == "pii"] == [
        (label, VALUES[label]) for _, label in said if label not in ("BAD", "MILD")
    ]
    assert [(f.label, text[f.start : f.end]) for f in found if f.family == "words"] == [
        (label, VALUES[label]) for _, label in said if label in ("BAD", "MILD")
    ]


def test_a_block_behind_redaction_names_the_part_it_is_in(staged: Guard):
    blocking = Guard.load(parse_policy(STAGED % "block", "t"), staged)
    parts = Slots([Slot("a@b.co mildword", ("parts", 0)), Slot("fine", ("parts", 1))], [(0, 1)])
    with pytest.raises(Blocked, match=r"^parts\[0\] was blocked"):
        asyncio.run(screening(blocking).screen_texts("prompt", parts))


@schema.parametrize()
@FUZZED
def test_every_answer_is_a_declared_one(case: Any, alone: Served):
    checks = [
        conformance.status_code_conformance,
        conformance.content_type_conformance,
        conformance.response_schema_conformance,
    ]
    case.call_and_validate(base_url=alone.url, checks=checks, timeout=20)
