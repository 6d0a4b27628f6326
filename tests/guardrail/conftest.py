"""The transformer before the fake predictor, for all tests of this folder that speak HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from fake_predictor import FakePredictor
from guarded import guardrail
from served import Served


@pytest.fixture(scope="session")
def predictor() -> Iterator[FakePredictor]:
    with FakePredictor(grpc=True) as predictor:
        yield predictor


@pytest.fixture(scope="session")
def transformer(predictor: FakePredictor) -> Iterator[Served]:
    """The shipped policy: secrets blocked in prompts and redacted in answers, PII redacted in both."""
    with guardrail(predictor.host) as server:
        yield server


@pytest.fixture
def client(transformer: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=transformer.url, timeout=20) as client:
        yield client
