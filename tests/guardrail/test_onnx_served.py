"""A classifier behind a server: vLLM's two routes, windows over long texts, and answers that are none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aim_guardrail.detectors.base import Asked, Misconfigured, Passage
from aim_guardrail.detectors.classifiers.detector import ClassifierDetector
from aim_guardrail.detectors.families import FAMILIES, Wanted, build_detector
from aim_guardrail.detectors.remote import RemoteFailed
from fake_judge import HANG, FakeJudge
from fake_predictor import FakePredictor
from guarded import ask, guardrail

CLASSES = ["non-toxic", "toxic", "threat"]


def classified(*rows: tuple[str | None, list[Any]]) -> dict[str, Any]:
    """As vLLM 0.32 answers `/classify`."""
    data = [
        {"index": at, "label": label, "probs": probs, "num_classes": len(probs)}
        for at, (label, probs) in enumerate(rows)
    ]
    usage = {"prompt_tokens": 10, "total_tokens": 10, "completion_tokens": 0, "prompt_tokens_details": None}
    head = {
        "id": "classify-7c87cac407b749a6935d8c7ce2a8fba2",
        "object": "list",
        "created": 1745383065,
        "model": "guard",
    }
    return {**head, "data": data, "usage": usage}


def pooled(*rows: list[Any]) -> dict[str, Any]:
    """As it answers `/pooling`."""
    data = [{"index": at, "object": "pooling", "data": row} for at, row in enumerate(rows)]
    usage = {"prompt_tokens": 10, "total_tokens": 10, "completion_tokens": 0, "prompt_tokens_details": None}
    return {"id": "pool-1", "object": "list", "created": 1745383065, "model": "guard", "data": data, "usage": usage}


def by_words(asked: dict[str, Any]) -> dict[str, Any]:
    """A classifier that takes a word for toxic, in whatever window it stands."""
    rows = {True: ("toxic", [0.05, 0.95, 0.1]), False: ("non-toxic", [0.98, 0.02, 0.01])}
    return classified(*(rows["awful" in text] for text in asked["input"]))


@pytest.fixture
def server() -> Iterator[FakeJudge]:
    with FakeJudge() as server:
        yield server


def detector(server: FakeJudge, **more: Any) -> ClassifierDetector:
    given = {"endpoint": server.url, "model": "guard", "classes": CLASSES, **more}
    options = FAMILIES["toxicity"].options.model_validate(given)
    made = build_detector("toxicity", Wanted(frozenset(["TOXIC", "THREAT"]), options))
    assert isinstance(made, ClassifierDetector)
    return made


async def scan(made: ClassifierDetector, *texts: str, seconds: float = 20) -> list[dict[str, float]]:
    passages = [Passage(text, "prompt") for text in texts]
    found = await made.scan_batch(passages, Asked(time.monotonic() + seconds))
    return [{finding.label: finding.score for finding in each} for each in found]


async def test_a_server_classifies(server: FakeJudge) -> None:
    made = detector(server)
    server.says = by_words
    assert made.cost == "remote"
    assert await scan(made, "awful", "hello") == [{"TOXIC": 0.95, "THREAT": 0.1}, {"TOXIC": 0.02, "THREAT": 0.01}]
    (asked,) = server.asked
    assert asked["path"] == "/classify"
    assert (asked["model"], asked["input"]) == ("guard", ["awful", "hello"])
    await made.close()


async def test_pooling_is_the_same_without_names(server: FakeJudge) -> None:
    made = detector(server, api="pooling")
    server.says = pooled([0.05, 0.95, 0.1])
    assert await scan(made, "awful") == [{"TOXIC": 0.95, "THREAT": 0.1}]
    assert server.asked[0]["path"] == "/pooling"
    await made.close()


async def test_answers_are_taken_by_their_index(server: FakeJudge) -> None:
    made = detector(server)
    answer = classified(("a", [0.9, 0.1, 0.0]), ("b", [0.2, 0.8, 0.0]))
    server.says = {**answer, "data": answer["data"][::-1]}
    assert [each["TOXIC"] for each in await scan(made, "first", "second")] == [0.1, 0.8]
    await made.close()


@pytest.mark.parametrize("place", [0, 799, 995, 1000, 50_000, 99_990])
async def test_a_long_text_goes_in_windows_and_none_of_it_escapes(server: FakeJudge, place: int) -> None:
    made = detector(server)
    server.says = by_words
    text = "x" * place + "awful" + "y" * (100_000 - place)
    ((toxic, _),) = await made.scan_batch([Passage(text, "prompt")], Asked(time.monotonic() + 20))
    assert toxic.score == 0.95
    assert "awful" in text[toxic.start : toxic.end]
    assert toxic.end - toxic.start == 1000
    assert all(len(window) <= 1000 for asked in server.asked for window in asked["input"])
    assert max(len(asked["input"]) for asked in server.asked) == 64
    await made.close()


WELL = classified(("toxic", [0.05, 0.95, 0.1]))


@pytest.mark.parametrize(
    ("says", "error", "match"),
    [
        (401, Misconfigured, "it refuses the key"),
        (403, Misconfigured, "the key may not use it"),
        (404, Misconfigured, "it knows no such route or model"),
        (500, RemoteFailed, "answered 500"),
        ({}, RemoteFailed, "did not answer each of 1 texts once"),
        ({"data": []}, RemoteFailed, "did not answer each of 1 texts once"),
        ({"data": [{**WELL["data"][0], "index": 1}]}, RemoteFailed, "did not answer each of 1 texts once"),
        ({"data": WELL["data"] * 2}, RemoteFailed, "did not answer each of 1 texts once"),
        ({"data": ["toxic"]}, RemoteFailed, "did not answer each of 1 texts once"),
        (classified(("toxic", [0.05, 0.95])), RemoteFailed, "what are not 3 numbers: check classes and api"),
        (pooled([0.05, 0.95, 0.1]), RemoteFailed, "what are not 3 numbers"),
        (classified(("toxic", [0.05, None, 0.1])), RemoteFailed, "no probability"),
        (classified(("toxic", [0.05, "0.9", 0.1])), RemoteFailed, "no probability"),
        (classified(("toxic", [0.05, True, 0.1])), RemoteFailed, "no probability"),
        (classified(("toxic", [-3.1, 4.2, 0.1])), RemoteFailed, "no probability: serve the model as a classifier"),
        (b'{"data": [{"index": 0, "probs": [NaN, 0.1, 0.2]}]}', RemoteFailed, "no JSON object"),
    ],
)
async def test_what_is_no_answer_is_an_error(server: FakeJudge, says: Any, error: type[Exception], match: str) -> None:
    made = detector(server)
    server.says = says
    with pytest.raises(error, match=match):
        await scan(made, "awful")
    await made.close()


async def test_the_deadline_holds(server: FakeJudge) -> None:
    made = detector(server)
    server.says = HANG
    with pytest.raises(TimeoutError):
        await scan(made, "awful", seconds=0.2)
    await made.close()


async def test_whoever_judges_otherwise_has_another_digest(server: FakeJudge) -> None:
    different = ({}, {"api": "pooling"}, {"window_chars": 500}, {"model": "other"}, {"labels": {"non-toxic": "INSULT"}})
    made = [detector(server, **more) for more in different]
    assert len({each.digest for each in made}) == len(made)
    for each in made:
        await each.close()


def test_a_policy_blocks_by_a_model_on_a_partition_of_its_own(
    server: FakeJudge, predictor: FakePredictor, tmp_path: Path
) -> None:
    server.says = by_words
    (tmp_path / "key").write_text("sk-guard-0001")
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 2\nname: p\nbudget_ms: 5000\nprompt:\n"
        "- type: toxicity\n  entities: [TOXIC]\n  threshold: 0.7\n  action: block\n"
        f"  options: {{endpoint: '{server.url}', model: guard, classes: [non-toxic, toxic, threat],"
        f" api_key_file: {tmp_path / 'key'}}}\n"
    )
    with guardrail(predictor.host, "--policy", str(policy)) as guarded:
        chat = f"{guarded.url}/v1/chat/completions"
        answers = [httpx.post(chat, json=ask(text), timeout=30) for text in ("hello", "awful")]
        assert [answer.status_code for answer in answers] == [200, 400]
        assert answers[1].headers["x-guardrail-families"] == "toxicity"
        assert server.asked[-1]["headers"]["authorization"] == "Bearer sk-guard-0001"
        server.says = 404
        refused = httpx.post(chat, json=ask("good morning"), timeout=30)
        assert refused.status_code == 503
