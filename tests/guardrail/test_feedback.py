"""``POST /feedback``: verdicts that were wrong, counted by family; only whose requests they were may say so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.course import Course
from aim_guardrail.policy import Verdict, shipped_policy
from aim_guardrail.review.recent import Recent
from aim_kserve.identity import keys as key_file
from closed_pair import bearer
from fake_predictor import FakePredictor
from guarded import ask, eventually, guardrail, metric
from served import Served

CHAT, MAIL = "/v1/chat/completions", "jane.doe@example.com"


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def server(predictor: FakePredictor, audit: Path) -> Iterator[Served]:
    with guardrail(predictor.host, "--audit_file", str(audit)) as server:
        yield server


def asked(server: Served, text: str) -> str:
    """A request's id."""
    return httpx.post(f"{server.url}{CHAT}", json=ask(text)).headers["x-request-id"]


def say(server: Served, **what: object) -> httpx.Response:
    return httpx.post(f"{server.url}/feedback", json=what)


def count(server: Served, family: str, label: str) -> float:
    return metric(server, "guardrail_feedback_total", family=family, label=label)


def test_a_false_positive_is_of_what_was_found(server: Served, audit: Path) -> None:
    request_id, before = asked(server, f"mail {MAIL}"), count(server, "pii", "false_positive")
    answer = say(server, request_id=request_id, label="false_positive")
    assert answer.status_code == 200
    said = answer.json()
    assert said.pop("policy").startswith("values/")
    assert said == {"request_id": request_id, "label": "false_positive", "families": ["pii"]}
    assert count(server, "pii", "false_positive") == before + 1

    def told() -> list[dict[str, object]]:
        return [line["feedback"] for line in map(orjson.loads, audit.read_bytes().splitlines()) if "feedback" in line]

    assert eventually(lambda: [line["request_id"] for line in told()][-1:] == [request_id])


def test_the_same_feedback_counts_once(server: Served) -> None:
    request_id, before = asked(server, f"mail {MAIL}"), count(server, "pii", "false_positive")
    for _ in range(3):
        assert say(server, request_id=request_id, label="false_positive", family="pii").status_code == 200
    assert count(server, "pii", "false_positive") == before + 1


@pytest.mark.parametrize(("family", "counted"), [(None, "any"), ("secrets", "secrets")])
def test_a_false_negative_is_of_what_was_missed(server: Served, family: str | None, counted: str) -> None:
    request_id, before = asked(server, "hi"), count(server, counted, "false_negative")
    answer = say(server, request_id=request_id, label="false_negative", **({"family": family} if family else {}))
    assert (answer.status_code, answer.json()["families"]) == (200, [counted])
    assert count(server, counted, "false_negative") == before + 1


@pytest.mark.parametrize(
    ("what", "status", "complaint"),
    [
        ({"request_id": "nobody's", "label": "false_positive"}, 404, "no request of late has that id"),
        ({"label": "false_positive"}, 400, "request_id: field required"),
        ({"request_id": "{id}", "label": "wrong"}, 400, "label: input should be 'false_positive' or"),
        ({"request_id": "{id}", "label": "false_negative", "family": "pi"}, 400, "'pi' is none: use one of"),
        ({"request_id": "{id}", "label": "false_positive", "family": "secrets"}, 400, "found in that request was pii"),
        (
            {"request_id": "{id}", "label": "false_positive", "famly": "pii"},
            400,
            "famly: .*known are request_id",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(server: Served, what: dict[str, str], status: int, complaint: str) -> None:
    request_id = asked(server, f"mail {MAIL}")
    answer = say(server, **{key: value.replace("{id}", request_id) for key, value in what.items()})
    assert answer.status_code == status
    assert re.search(complaint, answer.json()["error"]["message"]), answer.text


def test_it_is_no_request_of_the_predictors(server: Served, predictor: FakePredictor) -> None:
    before = len(predictor.seen)
    say(server, request_id="x", label="false_positive")
    assert len(predictor.seen) == before


def test_only_who_asked_and_administrators_may_say_so(predictor: FakePredictor, tmp_path: Path) -> None:
    scopes: dict[str, list[object]] = {"a": ["infer", "filter"], "b": ["filter"], "root": ["filter", "admin"]}
    made = {name: key_file.new_key(name, tenant=name, scopes=granted) for name, granted in scopes.items()}  # type: ignore[arg-type]
    key_file.write(tmp_path / "keys.yaml", key_file.KeyFile(keys=tuple(entry for _, entry in made.values())))
    with guardrail(predictor.host, "--api_keys", str(tmp_path / "keys.yaml")) as server:
        answer = httpx.post(f"{server.url}{CHAT}", json=ask(MAIL), headers=bearer(made["a"][0]))
        told = {"request_id": answer.headers["x-request-id"], "label": "false_positive"}
        statuses = {
            name: httpx.post(f"{server.url}/feedback", json=told, headers=bearer(text)).status_code
            for name, (text, _) in made.items()
        }
    assert statuses == {"a": 200, "b": 404, "root": 200}


async def test_what_is_remembered_is_bounded() -> None:
    recent = Recent(most=3)
    for number in range(10):
        await recent(_context(number)).ended(_course(_context(number)))
    assert [number for number in range(10) if recent.get(f"r{number}")] == [7, 8, 9]


def _context(number: int) -> RequestContext:
    return RequestContext(CHAT, request_id=f"r{number}")


def _course(context: RequestContext) -> Course:
    policy = shipped_policy("values")
    return Course("prompt", context, policy, "allow", "allowed", None, [Verdict()], [], [], 0.0, 0.0)
