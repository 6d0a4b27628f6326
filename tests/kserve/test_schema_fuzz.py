"""Requests made up from the routes' schemas, valid and not: every answer has a declared status, kind and shape.

Bounded and the same on every run; ``FUZZ_EXAMPLES=200 pytest tests/kserve/test_schema_fuzz.py`` looks further.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guarded import guardrail
from openapi_document import document, speaks_openai
from served import Served

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is missing: it comes with the extra dev")
conformance = pytest.importorskip("schemathesis.specs.openapi.checks")

CHECKS = [
    conformance.status_code_conformance,  # no 5xx but the declared 501, 502 and 503
    conformance.content_type_conformance,
    conformance.response_schema_conformance,
]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "8"))
FUZZED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
schema = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Served]]:
    """The runtime's server over the fake engine, and the transformer before it."""
    with Served.fake(most_tokens=100) as runtime, guardrail(f"127.0.0.1:{runtime.http_port}") as transformer:
        yield {"runtime": runtime, "guardrail": transformer}
        for server in (runtime, transformer):
            assert server.process.poll() is None
            assert "Traceback" not in server.stderr()


@pytest.fixture(scope="module", params=["runtime", "guardrail"])
def server(request: pytest.FixtureRequest, servers: dict[str, Served]) -> Served:
    return servers[request.param]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=20) as client:
        yield client


@schema.parametrize()
@FUZZED
def test_every_answer_is_a_declared_one(case: Any, server: Served) -> None:
    case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=20)


VALID = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/openai/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/models/m:predict": {"instances": ["hi"]},
    "/v2/models/m/infer": {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["hi"]}]},
}


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes, dict[str, str]]:
    """A path, a body with some bytes replaced, cut or doubled, and headers that may not fit."""
    path = draw(st.sampled_from(sorted(VALID)))
    body = orjson.dumps(VALID[path])
    start, end = sorted((draw(st.integers(0, len(body))), draw(st.integers(0, len(body)))))
    middle = draw(
        st.one_of(st.binary(max_size=8), st.just(body[start:end] * 2), st.sampled_from([b"\xff", b"\0", b"{"]))
    )
    headers = {}
    if draw(st.booleans()):
        kinds = ["application/json", "text/plain", "application/octet-stream", "multipart/form-data", "x", ""]
        headers["content-type"] = draw(st.sampled_from(kinds))
    if draw(st.booleans()):
        headers["inference-header-content-length"] = draw(
            st.sampled_from(["0", "1", "x", "-1", "1e3", str(len(body)), "9" * 30])
        )
    return path, body[:start] + middle + body[end:], headers


@settings(FUZZED, max_examples=EXAMPLES * 10)
@given(request=damaged())
def test_no_damaged_request_is_our_fault(
    server: Served, client: httpx.Client, request: tuple[str, bytes, dict[str, str]]
) -> None:
    path, body, headers = request
    answer = client.post(server.url + path, content=body, headers=headers)
    assert answer.status_code in (200, 400, 404, 413, 415), (request, answer.text)
    if answer.status_code != 200:
        assert answer.headers["content-type"] == "application/json"
        assert isinstance(answer.json()["error"], dict if speaks_openai(path) else str)


def test_the_server_s_own_document_tells_every_route_that_is_tried(servers: dict[str, Served]) -> None:
    told = httpx.get(f"{servers['runtime'].url}/openapi.json").json()["paths"]
    not_of_this_engine = {"/v1/embeddings", "/v1/responses"}
    assert _shapes(document()["paths"]) - _shapes(told) == {"/openapi.json", *not_of_this_engine}


def _shapes(paths: Iterable[str]) -> set[str]:
    """Each path, whatever its parameters are called."""
    return {re.sub(r"\{\w+\}", "{}", path) for path in paths}
