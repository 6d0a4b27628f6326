"""Names of people, places and organizations: found by the real model behind the inline stage, redacted, restored."""

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from aim_guardrail.detectors.base import Asked, Misconfigured, Passage
from aim_guardrail.detectors.ner.detector import NerDetector
from aim_guardrail.detectors.ner.family import LABELS, NerOptions
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import parse_policy

TEXT = "My name is Angela Merkel and I live in Berlin. I work for Siemens AG."


@pytest.fixture(scope="module")
def detector() -> NerDetector:
    return NerDetector(frozenset(LABELS), NerOptions())


async def found(detector: NerDetector, text: str) -> list[tuple[str, str]]:
    asked = Asked(time.monotonic() + 30)
    (findings,) = await detector.scan_batch([Passage(text, "prompt")], asked)
    return [(f.label, text[f.start : f.end]) for f in findings]


async def test_finds_people_places_and_organizations(detector: NerDetector):
    names = [("PERSON", "Angela Merkel"), ("LOCATION", "Berlin"), ("ORGANIZATION", "Siemens AG")]
    assert await found(detector, TEXT) == names
    far = "\u200b word " * 1500
    assert [name for name in await found(detector, far + TEXT) if name in names] == names


async def test_known_false_names_are_left_out(detector: NerDetector):
    assert not {"SSN", "IBAN"} & {
        name for _, name in await found(detector, "His SSN and his IBAN are here, the IBAN too.")
    }
    assert not [name for _, name in await found(detector, "Ask <PERSON_1> of <ORGANIZATION_2>.") if "<" in name]


async def test_only_what_is_wanted():
    assert await found(NerDetector(frozenset({"PERSON"}), NerOptions()), TEXT) == [("PERSON", "Angela Merkel")]


def test_a_model_that_is_not_there_is_refused_with_the_remedy():
    with pytest.raises(Misconfigured, match="install the extra 'ner'"):
        NerDetector(frozenset(LABELS), NerOptions(model="no_such_model"))


async def test_names_are_hidden_from_the_predictor_and_said_again():
    rule = "{type: ner, action: redact, restore: true, timeout_ms: 60000}"
    guard = await asyncio.to_thread(
        Guard.load, parse_policy(f"{{version: 2, name: t, budget_ms: 60000, prompt: [{rule}]}}", "t")
    )
    screening = Screening(guard, Metrics(CollectorRegistry()), RequestContext("/"))
    body = {"messages": [{"role": "user", "content": TEXT}]}
    await screening.screen("prompt", body)
    hidden = body["messages"][0]["content"]
    assert hidden == "My name is <PERSON_1> and I live in <LOCATION_1>. I work for <ORGANIZATION_1>."
    answer = {"choices": [{"message": {"content": hidden}}]}
    await screening.screen("answer", answer)
    assert answer["choices"][0]["message"]["content"] == TEXT
