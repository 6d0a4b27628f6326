"""The client to a server that judges: what it sends, what it makes of every way an answer can be wrong."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import certificates
from aim_guardrail.detectors.base import Misconfigured, Unjudged
from aim_guardrail.detectors.endpoint import Endpoint
from aim_guardrail.detectors.remote import MOST_BYTES, Remote, RemoteFailed
from fake_judge import DROP, HANG, FakeJudge
from guarded import eventually
from ports import free_ports

KEY = "judge-key-1"


@pytest.fixture
def judge() -> Iterator[FakeJudge]:
    with FakeJudge() as judge:
        yield judge


@pytest.fixture
async def remote(judge: FakeJudge) -> AsyncIterator[Remote]:
    remote = Remote(Endpoint(endpoint=judge.url, model="m"))
    yield remote
    await remote.close()


async def comes(condition: Callable[[], bool]) -> bool:
    """As `eventually`, while our own loop runs."""
    return await asyncio.to_thread(eventually, condition)


def soon(seconds: float = 10) -> float:
    return time.monotonic() + seconds


async def test_sends_json_and_brings_an_object_back(judge: FakeJudge, remote: Remote):
    judge.says = {"choices": []}
    assert await remote.post("/completions", {"prompt": "née"}, soon()) == {"choices": []}
    assert judge.asked[0]["path"] == "/v1/completions"
    assert judge.asked[0]["prompt"] == "née"
    assert "authorization" not in judge.asked[0]["headers"]


async def test_keeps_its_connection(judge: FakeJudge, remote: Remote):
    for _ in range(5):
        await remote.post("/completions", {}, soon())
    assert len(judge.connections) == 1


async def test_a_kept_connection_that_is_gone_is_made_anew(judge: FakeJudge, remote: Remote):
    await remote.post("/completions", {}, soon())
    answers = iter([DROP, {"again": 1}])
    judge.says = lambda _: next(answers)
    assert await remote.post("/completions", {}, soon()) == {"again": 1}


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 501])
async def test_what_any_text_would_get_is_a_matter_of_configuration(judge: FakeJudge, remote: Remote, status: int):
    judge.says = status
    with pytest.raises(Misconfigured, match=f"/v1/completions answered {status}: .*"):
        await remote.post("/completions", {}, soon())


@pytest.mark.parametrize("status", [400, 408, 409, 413, 422, 429, 500, 502, 503, 504])
async def test_other_statuses_are_errors(judge: FakeJudge, remote: Remote, status: int):
    judge.says = status
    with pytest.raises(RemoteFailed, match=f"answered {status}$") as failed:
        await remote.post("/completions", {}, soon())
    assert isinstance(failed.value, Unjudged) == (status in (400, 413, 422))  # of this text, not of the server


async def test_a_redirect_is_not_followed(judge: FakeJudge, remote: Remote):
    with FakeJudge() as elsewhere:
        judge.heads = {"location": elsewhere.url + "/completions"}
        for judge.says in (301, 302, 303, 307, 308):
            with pytest.raises(Misconfigured, match="a redirect, which is not followed"):
                await remote.post("/completions", {}, soon())
        assert elsewhere.asked == []


@pytest.mark.parametrize("body", [b"", b"safe", b"[]", b'"safe"', b"null", b'{"a":', b"\xff\xfe{}", b"<html></html>"])
async def test_what_is_no_json_object_is_an_error(judge: FakeJudge, remote: Remote, body: bytes):
    judge.says = body
    with pytest.raises(RemoteFailed, match="no JSON object"):
        await remote.post("/completions", {}, soon())


async def test_more_than_can_be_an_answer_is_not_read(judge: FakeJudge, remote: Remote):
    judge.says = b'{"a":"' + b"x" * (8 * MOST_BYTES) + b'"}'
    with pytest.raises(RemoteFailed, match=f"more than {MOST_BYTES} bytes"):
        await remote.post("/completions", {}, soon())


async def test_a_compressed_answer_is_not_unpacked(judge: FakeJudge, remote: Remote):
    judge.heads = {"content-encoding": "gzip"}
    judge.says = b"\x1f\x8b"
    with pytest.raises(RemoteFailed, match="compressed"):
        await remote.post("/completions", {}, soon())


async def test_silence_ends_at_the_deadline_and_the_connection_with_it(judge: FakeJudge, remote: Remote):
    judge.says = HANG
    with pytest.raises(TimeoutError):
        await remote.post("/completions", {}, soon(0.1))
    assert await comes(lambda: judge.open == 0)


async def test_a_deadline_that_is_past_asks_nothing(judge: FakeJudge, remote: Remote):
    with pytest.raises(TimeoutError):
        await remote.post("/completions", {}, soon(-1))
    assert judge.asked == []


async def test_who_is_cancelled_closes_the_connection_at_once(judge: FakeJudge, remote: Remote):
    judge.says = HANG
    task = asyncio.ensure_future(remote.post("/completions", {}, soon(60)))
    assert await comes(lambda: judge.open == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await comes(lambda: judge.open == 0)


async def test_nobody_there_is_an_error():
    remote = Remote(Endpoint(endpoint=f"http://127.0.0.1:{free_ports(1)[0]}/v1", model="m"))
    with pytest.raises(RemoteFailed, match="cannot be reached"):
        await remote.post("/completions", {}, soon())
    await remote.close()


async def test_a_connection_that_is_dropped_is_an_error(
    judge: FakeJudge, remote: Remote, caplog: pytest.LogCaptureFixture
):
    judge.says = DROP
    with pytest.raises(RemoteFailed, match="closed the connection"):
        await remote.post("/completions", {}, soon())
    assert len(judge.asked) == 2  # once more, on a fresh connection
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# --- key ----------------------------------------------------------------------------------------------------------


async def test_the_key_is_read_from_its_file_and_again_when_it_changes(
    judge: FakeJudge, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    remote = Remote(Endpoint(endpoint=judge.url, model="m", api_key_file=str(file)))
    await remote.post("/completions", {}, soon())
    assert judge.asked[-1]["headers"]["authorization"] == f"Bearer {KEY}"
    file.write_text("judge-key-2")

    async def sends_the_new_one() -> bool:
        await remote.post("/completions", {}, soon())
        return bool(judge.asked[-1]["headers"]["authorization"] == "Bearer judge-key-2")

    for _ in range(100):
        if await sends_the_new_one():
            break
        await asyncio.sleep(0.05)
    else:
        pytest.fail("the new key is not taken up")
    judge.says = 401
    with pytest.raises(Misconfigured) as refused:
        await remote.post("/completions", {}, soon())
    await remote.close()
    assert "judge-key" not in str(refused.value) + caplog.text


@pytest.mark.parametrize("content", [None, "", "two words"])
def test_a_key_file_that_holds_none_is_refused(tmp_path: Path, content: str | None):
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"api_key_file .*key: (cannot be read|does not hold one key)"):
        Remote(Endpoint(endpoint="http://judge", model="m", api_key_file=str(file)))


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.certificate(tmp_path_factory.mktemp("tls") / "judge.pem")


async def test_speaks_tls_with_whom_its_authority_vouches_for(certificate: Path):
    with FakeJudge(certificates.of_server(certificate)) as judge:
        judge.says = {"ok": 1}
        trusting = Remote(Endpoint(endpoint=judge.url, model="m", ca_file=str(certificate)))
        assert await trusting.post("/completions", {}, soon()) == {"ok": 1}
        await trusting.close()
        others = Remote(Endpoint(endpoint=judge.url, model="m"))
        with pytest.raises(Misconfigured, match="its certificate does not hold"):
            await others.post("/completions", {}, soon())
        await others.close()


def test_an_authority_that_is_none_is_refused(tmp_path: Path):
    file = tmp_path / "ca.pem"
    file.write_text("nothing")
    with pytest.raises(ValueError, match=r"ca_file .*: no readable PEM certificates"):
        Remote(Endpoint(endpoint="https://judge", model="m", ca_file=str(file)))


# --- address ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [("http://guard:8080/v1", "http://guard:8080/v1"), ("https://api.example.com/v1/", "https://api.example.com/v1")],
)
def test_an_endpoint_is_a_base_url(given: str, kept: str):
    assert Endpoint(endpoint=given, model="m").endpoint == kept


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("guard:8080", "no address of a server"),
        ("ftp://guard", "no address of a server"),
        ("http://", "no address of a server"),
        ("http://guard:99999/v1", "no address of a server"),
        ("http://guard/v1\n", "no address of a server"),
        ("http://user:pass@guard/v1", "holds no credentials"),
        ("http://guard/v1?key=1", "more than a base URL"),
        ("http://guard/v1#x", "more than a base URL"),
    ],
)
def test_what_is_no_base_url_is_refused(given: str, why: str):
    with pytest.raises(ValidationError, match=why):
        Endpoint(endpoint=given, model="m")


def test_credentials_in_an_endpoint_are_not_repeated():
    options: dict[str, Any] = {"endpoint": "http://user:hunter2@guard/v1", "model": "m"}
    with pytest.raises(ValidationError) as refused:
        Endpoint(**options)
    assert "hunter2" not in refused.value.errors()[0]["msg"]
