"""Request ids, trace context and the JSON line, in process."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest
from starlette.types import Receive, Scope, Send

from aim_kserve.access import AccessLog, current_log, log_of, open_log
from aim_kserve.http import send_bytes

TRACE = f"00-{'a' * 32}-{'b' * 16}-01"


class Recorded:
    """An app that notes a field and answers ``status``; the lines that the access log writes."""

    def __init__(self, status: int = 200, fails: bool = False) -> None:
        self.lines: list[dict[str, Any]] = []
        self.status, self.fails = status, fails
        self.app = AccessLog(self._answer, write=lambda line: self.lines.append(orjson.loads(line)))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert log_of(scope) is current_log()
        log_of(scope).fields["model"] = "m"
        if self.fails:
            raise RuntimeError("unforeseen")
        await send_bytes(send, b"{}", status=self.status)

    async def get(self, path: str = "/v1/x", **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers={key.replace("_", "-"): value for key, value in headers.items()})


async def test_the_line() -> None:
    recorded = Recorded(status=404)
    answer = await recorded.get(x_request_id="mine", traceparent=TRACE)
    (line,) = recorded.lines
    assert answer.headers["x-request-id"] == line["request_id"] == "mine"
    assert (line["trace_id"], line["parent_id"]) == ("a" * 32, "b" * 16)
    assert (line["method"], line["path"], line["status"], line["complete"]) == ("GET", "/v1/x", 404, True)
    assert line["model"] == "m"
    assert 0 <= line["first_byte_ms"] <= line["duration_ms"] + 0.01
    assert len(line["span_id"]) == 16


async def test_a_failure_is_logged_as_500() -> None:
    recorded = Recorded(fails=True)
    await recorded.get()
    (line,) = recorded.lines
    assert (line["status"], line["complete"], line["first_byte_ms"]) == (500, False, None)


@pytest.mark.parametrize(
    ("path", "status", "lines"),
    [
        ("/metrics", 200, 0),
        ("/health", 200, 0),
        ("/health", 503, 1),
        ("/ping", 200, 0),
        ("/v2/health/ready", 200, 0),
        ("/v2/health/ready", 503, 1),
        ("/v2/models/m/ready", 200, 0),
        ("/", 200, 0),
        ("/v1/x", 200, 1),
    ],
)
async def test_probes_that_succeed_are_not_logged(path: str, status: int, lines: int) -> None:
    recorded = Recorded(status)
    await recorded.get(path)
    assert len(recorded.lines) == lines


@pytest.mark.parametrize("given", ["", "with space", "x" * 129, 'quote"', "ünïcode"])
def test_malformed_request_ids_are_replaced(given: str) -> None:
    log = open_log([(b"x-request-id", given.encode("latin-1"))])
    assert log.request_id == log.trace_id
    assert len(log.trace_id) == 32


@pytest.mark.parametrize(
    "given",
    [
        "",
        "junk",
        f"ff-{'a' * 32}-{'b' * 16}-01",
        f"00-{'0' * 32}-{'b' * 16}-01",
        f"00-{'a' * 32}-{'0' * 16}-01",
        "00-A",
    ],
)
def test_malformed_traces_start_a_new_one(given: str) -> None:
    log = open_log([(b"traceparent", given.encode())])
    assert log.parent_id is None
    assert log.trace_id != "a" * 32


def test_the_trace_goes_on() -> None:
    log = open_log([(b"traceparent", TRACE.encode())])
    assert log.traceparent == f"00-{'a' * 32}-{log.span_id}-01"
    assert log.span_id != "b" * 16


@pytest.mark.parametrize("headers", [[], [(b"x-request-id", b"mine")], [(b"traceparent", TRACE.encode())]])
def test_unique_ids_are_unique(headers: list[tuple[bytes, bytes]]) -> None:
    assert open_log(headers).unique_id != open_log(headers).unique_id


def test_counts_add_up() -> None:
    log = open_log([])
    log.add(tokens=2)
    log.add(tokens=3, calls=1)
    assert log.fields == {"tokens": 5, "calls": 1}
