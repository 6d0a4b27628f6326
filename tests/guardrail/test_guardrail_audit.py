"""The audit: a line for each decision, whatever becomes of the request, in a chain that tells what was changed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.client
import io
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import grpc
import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry

from aim_guardrail.audit.chain import Broken, Last, sealed, verified
from aim_guardrail.audit.entry import entry
from aim_guardrail.audit.excerpt import Excerpts
from aim_guardrail.audit.file import AuditFile
from aim_guardrail.audit.trail import Overflow, Trail
from aim_guardrail.cli import audit as cli
from aim_guardrail.detectors.base import Finding
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.course import Answered, Course
from aim_guardrail.policy import Verdict, shipped_policy
from aim_guardrail.slots.slot import Slot, Slots
from aim_kserve.errors import Unavailable
from aim_kserve.identity import keys
from aim_kserve.kserve import pb, pb_grpc
from closed_pair import bearer
from fake_predictor import FakePredictor
from guarded import ask, events, eventually, guardrail, metric, orders, said
from served import Served

CHAT = "/v1/chat/completions"
KEY, CARD, MAIL = "AKIA" + "3XPZ7QKLMN2VWTYB", "4111 1111 1111 1111", "jane.doe@example.com"
SECRET = b"an-audit-key-of-the-test"


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def whole(file: Path) -> int:
    """How many lines there are, none of them broken."""
    return verified(file.read_bytes().splitlines(keepends=True), None)[0]


def verify(*arguments: object) -> tuple[int, str]:
    """``aim-guardrail audit verify``: its exit code, what it prints."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        code = cli.main(["verify", *map(str, arguments)])
    return code, out.getvalue()


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_bytes(SECRET + b"\n")
    return file


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture
def acme(keys_file: Path) -> dict[str, str]:
    """The header of a caller of tenant acme."""
    text, made = keys.new_key("k", tenant="acme", scopes=["infer"])
    keys.write(keys_file, keys.KeyFile(keys=(made,)))
    return bearer(text)


# --- through the real server ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited(predictor: FakePredictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path, Path]]:
    """One process for all tests that need no flags of their own; its audit, and its key."""
    directory = tmp_path_factory.mktemp("audited")
    audit, key_file = directory / "audit.jsonl", directory / "key"
    key_file.write_bytes(SECRET)
    with guardrail(predictor.host, "--audit_file", str(audit), "--audit_key_file", str(key_file)) as server:
        yield server, audit, key_file


def test_a_line_for_each_decision_whatever_becomes_of_it(
    audited: tuple[Served, Path, Path], predictor: FakePredictor
) -> None:
    server, audit, key_file = audited
    before = len(lines_of(audit))
    body = orjson.dumps(ask(f"my card is {CARD}"))
    with httpx.Client(base_url=server.url, timeout=20) as client:

        def post(request_id: str, what: Any, **headers: str) -> httpx.Response:
            content = what if isinstance(what, bytes) else orjson.dumps(what)
            return client.post(CHAT, content=content, headers={"x-request-id": request_id, **headers})

        post("redacted", body)
        post("blocked", ask(f"key {KEY}"))
        post("allowed", ask("hi"))
        post("answer", ask("hi"), **orders(say=f"write to {MAIL}"))
        post("streamed", ask("hi", stream=True), **orders(say=f"write to {MAIL} and on"))
        post("no-json", b"{")
        post("broken", ask("hi"), **orders(drop_after=0))
        post("broken-stream", ask("hi", stream=True), **orders(drop_after=200))
        client.get("/v1/models", headers={"x-request-id": "models"})
        client.post("/filter", json={"text": f"mail {MAIL}"}, headers={"x-request-id": "filter"})
        client.post(
            "/filter/batch",
            json={"items": [{"text": "a"}, {"text": MAIL, "direction": "answer"}]},
            headers={"x-request-id": "batch"},
        )
    leaving = http.client.HTTPConnection("127.0.0.1", server.http_port)
    json = {"content-type": "application/json", "x-request-id": "left"}
    leaving.request("POST", CHAT, orjson.dumps(ask("x")), {**json, **orders(hang_after=-1)})
    assert eventually(lambda: predictor.open == 1)
    leaving.close()
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(MAIL.encode())
    with grpc.insecure_channel(server.grpc_url) as channel:
        pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, metadata=[("x-request-id", "grpc")], timeout=20)
    expected = {
        ("redacted", "prompt"): "redacted",
        ("redacted", "answer"): "allowed",
        ("blocked", "prompt"): "blocked",
        ("allowed", "prompt"): "allowed",
        ("allowed", "answer"): "allowed",
        ("answer", "prompt"): "allowed",
        ("answer", "answer"): "redacted",
        ("streamed", "prompt"): "allowed",
        ("streamed", "answer"): "redacted",
        ("no-json", "prompt"): "error",
        ("broken", "prompt"): "allowed",
        ("broken", "answer"): "error",
        ("broken-stream", "prompt"): "allowed",
        ("broken-stream", "answer"): "error",
        ("models", "prompt"): "allowed",
        ("models", "answer"): "allowed",
        ("filter", "prompt"): "redacted",
        ("batch", "prompt"): "allowed",
        ("batch", "answer"): "redacted",
        ("left", "prompt"): "allowed",
        ("left", "answer"): "client_gone",
        ("grpc", "prompt"): "redacted",
        ("grpc", "answer"): "allowed",
    }
    assert eventually(lambda: len(lines_of(audit)) == before + len(expected)), lines_of(audit)
    lines = lines_of(audit)[before:]
    assert {(line["request_id"], line["direction"]): line["outcome"] for line in lines} == expected
    by_id = {(line["request_id"], line["direction"]): line for line in lines}

    line = by_id["redacted", "prompt"]
    assert line["content_hmac"] == hmac.new(SECRET, body, "sha256").hexdigest()
    assert line["tenant"] is None
    assert line["policy"].startswith("values/")
    assert line["action"] == "redact"
    (finding,) = line["findings"]
    assert (finding["family"], finding["label"], finding["action"]) == ("pii", "CREDIT_CARD", "redact")
    assert (finding["start"], finding["end"]) == (11, 11 + len(CARD))
    assert 0 < line["check_ms"] <= line["since_ms"]
    assert by_id["broken", "answer"]["error"] == "predictor_broken"
    assert by_id["no-json", "prompt"]["error"]
    for value in (CARD, KEY, MAIL, CARD.replace(" ", "")):  # no fewer digits: a digest may have them, too
        assert value.encode() not in audit.read_bytes()
    assert metric(server, "guardrail_audit_dropped_total") == 0
    count = before + len(lines)
    assert verify(audit, "--key_file", key_file) == (
        0,
        f"{audit}: {count} lines, unbroken up to line {count} of the chain, {lines[-1]['hmac_sha256']}\n",
    )
    assert verify(audit)[0] == 1  # not without the key


def test_what_a_stream_said_has_its_digest(audited: tuple[Served, Path, Path]) -> None:
    server, audit, _ = audited
    before = len(lines_of(audit))
    raw = 'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\ndata: [DONE]\n\n'
    httpx.post(f"{server.url}{CHAT}", json=ask("x", stream=True), headers=orders(raw=raw))
    assert eventually(lambda: len(lines_of(audit)) == before + 2)
    assert lines_of(audit)[-1]["content_hmac"] == hmac.new(SECRET, raw.encode(), "sha256").hexdigest()


def test_a_killed_server_leaves_a_chain_that_goes_on(predictor: FakePredictor, audit: Path) -> None:
    for run in (1, 2):
        with guardrail(predictor.host, "--audit_file", str(audit)) as server:
            assert ("cut short" in server.stderr()) == (run == 2)
            for _ in range(20):
                httpx.post(f"{server.url}{CHAT}", json=ask("hi"))
            assert eventually(lambda done=run: len(lines_of(audit)) == 40 * done)
            server.process.kill()
            server.process.wait()
        with audit.open("ab") as file:
            file.write(b'{"seq":41,"ts":17')  # the crash came in the middle of a line
        assert verify(audit)[0] == 0
        assert f"{40 * run} lines" in verify(audit)[1]


def test_a_file_that_was_moved_away_is_left_alone(audited: tuple[Served, Path, Path]) -> None:
    server, audit, key_file = audited
    before, old = len(lines_of(audit)), audit.with_name("audit.1")
    httpx.post(f"{server.url}{CHAT}", json=ask("hi"))
    assert eventually(lambda: len(lines_of(audit)) == before + 2)
    audit.rename(old)
    server.process.send_signal(1)  # SIGHUP, as logrotate does
    httpx.post(f"{server.url}{CHAT}", json=ask("hi"))
    assert eventually(lambda: audit.exists() and len(lines_of(audit)) == 2)
    assert len(lines_of(old)) == before + 2
    keyed = ("--key_file", key_file)
    assert verify(old, audit, *keyed)[0] == 0
    assert verify(audit, *keyed)[0] == 0
    code, told = verify(audit, old, *keyed)
    assert code == 1
    assert f"it follows line 0 of the chain, not {before + 4}" in told


def test_tenants_are_digests_unless_asked(
    predictor: FakePredictor, audit: Path, key_file: Path, acme: dict[str, str], keys_file: Path
) -> None:
    flags = ["--api_keys", str(keys_file), "--audit_key_file", str(key_file), "--audit_file", str(audit)]
    with guardrail(predictor.host, *flags) as server:
        httpx.post(f"{server.url}{CHAT}", json=ask("hi"), headers=acme)
        assert eventually(lambda: len(lines_of(audit)) == 2)
    assert lines_of(audit)[0]["tenant"] == hmac.new(SECRET, b"tenant:acme", "sha256").hexdigest()[:32]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--audit_file", "/no/such/folder/audit"], 1, "error: --audit_file /no/such/folder/audit: No such file"),
        (["--audit_file", "/dev/null"], 1, "error: --audit_file /dev/null: is no regular file"),
        (["--audit_key_file", "{key}"], 2, "audit_key_file is the key of an audit"),
        (["--audit_file", "{key}"], 1, "its last line is none of an audit"),
        (["--audit_file", "a", "--audit_overflow", "wait"], 2, "audit_overflow"),
    ],
)
def test_what_cannot_be_written_stops_the_start(key_file: Path, flags: list[str], code: int, said: str) -> None:
    filled = [flag.replace("{key}", str(key_file)) for flag in flags]
    command = [sys.executable, "-m", "aim_guardrail", "--predictor_host", "127.0.0.1:9", "--http_port", "0", *filled]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr


# --- the chain ------------------------------------------------------------------------------------------------------


def chain(count: int, key: bytes | None) -> list[bytes]:
    last, lines = Last(), []
    for number in range(count):
        line, last = sealed({"n": number, "text": 'it says "sha256":"no"'}, last, key)
        lines.append(line)
    return lines


@pytest.mark.parametrize("key", [None, SECRET])
@pytest.mark.parametrize(
    ("change", "broken_at"),
    [
        (lambda lines: lines, None),
        (lambda lines: [*lines[:3], lines[3].replace(b'"n":3', b'"n":4'), *lines[4:]], 4),
        (lambda lines: [*lines[:3], *lines[4:]], 4),
        (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], 4),
        (lambda lines: [*lines[:3], b"{}\n", *lines[3:]], 4),
        (lambda lines: [*lines[:3], lines[3][:-10] + b"\n", *lines[4:]], 4),
        (lambda lines: [*lines[:3], lines[3], *lines[3:]], 5),
        (lambda lines: lines[2:], None),  # what was rotated away is not missed in this file
        (lambda lines: [*lines[:-1], lines[-1][:-1]], None),  # a crash's last line
        (lambda lines: [*lines[:-1], lines[-1][:20]], None),
    ],
)
def test_what_was_changed_is_found(
    key: bytes | None, change: Callable[[list[bytes]], list[bytes]], broken_at: int | None
) -> None:
    changed = change(chain(6, key))
    if broken_at is None:
        whole = sum(line.endswith(b"\n") for line in changed)
        assert verified(changed, key)[0] == whole
        return
    with pytest.raises(Broken) as caught:
        verified(changed, key)
    assert caught.value.number == broken_at


def test_every_byte_counts() -> None:
    lines = chain(3, SECRET)
    middle = lines[1]
    for at in range(len(middle) - 1):
        changed = middle[:at] + bytes([middle[at] ^ 1]) + middle[at + 1 :]
        with pytest.raises(Broken) as caught:
            verified([lines[0], changed, lines[2]], SECRET)
        assert caught.value.number in (1, 2), at


def test_a_digest_is_anybodys_to_make_without_the_key_only() -> None:
    """What the page says of both kinds."""
    line, _ = sealed({"n": 0}, Last(), None)
    body = line[: line.rindex(b',"sha256"')]
    assert orjson.loads(line)["sha256"] == hashlib.sha256(body).hexdigest()
    with pytest.raises(Broken, match="another key"):
        verified(chain(1, SECRET), b"another")


# --- overflow -------------------------------------------------------------------------------------------------------


class Slow:
    """A disk that takes nothing until it is told to."""

    def __init__(self, file: AuditFile) -> None:
        self._file, self.free = file, threading.Event()

    def append(self, entries: list[dict[str, Any]]) -> None:
        self.free.wait(10)
        self._file.append(entries)

    def close(self) -> None:
        self._file.close()


def trail_over(audit: Path, overflow: Overflow, most: int) -> tuple[Slow, Trail, CollectorRegistry]:
    slow, registry = Slow(AuditFile(audit, None)), CollectorRegistry()
    return slow, Trail(slow, overflow, most, registry), registry  # type: ignore[arg-type]


async def test_drop_loses_lines_and_says_so(audit: Path) -> None:
    slow, trail, registry = trail_over(audit, "drop", 5)
    for number in range(12):
        await trail.put({"n": number})
    assert registry.get_sample_value("guardrail_audit_dropped_total") == 7
    slow.free.set()
    await asyncio.to_thread(_until, lambda: len(lines_of(audit)) == 6)
    await trail.put({"n": 99})
    await asyncio.to_thread(trail.close)
    lines = lines_of(audit)
    assert [line["n"] for line in lines if "n" in line] == [0, 1, 2, 3, 4, 99]
    assert [line["lost"] for line in lines if "lost" in line] == [7]
    assert whole(audit) == 7


async def test_block_waits_and_loses_none(audit: Path) -> None:
    slow, trail, registry = trail_over(audit, "block", 5)
    putting = asyncio.gather(*(trail.put({"n": number}) for number in range(50)))
    await asyncio.sleep(0.05)
    assert not putting.done()
    slow.free.set()
    await asyncio.wait_for(putting, 10)
    await asyncio.to_thread(trail.close)
    assert Counter(line["n"] for line in lines_of(audit)) == Counter(range(50))
    assert registry.get_sample_value("guardrail_audit_dropped_total") == 0


async def test_refuse_takes_no_request_that_could_not_be_told_of(audit: Path) -> None:
    slow, trail, _ = trail_over(audit, "refuse", 4)
    trail.reserve(2)
    trail.reserve(2)
    with pytest.raises(Unavailable) as caught:
        trail.reserve(2)
    assert caught.value.code == "audit_backlog"
    await trail.put({"n": 0})
    trail.release(2)
    trail.release(2)
    trail.reserve(2)
    slow.free.set()
    await asyncio.to_thread(trail.close)
    assert len(lines_of(audit)) == 1


async def test_a_disk_that_is_full_is_tried_again(audit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aim_guardrail.audit.trail._RETRY_S", 0.01)
    file, registry, real = AuditFile(audit, None), CollectorRegistry(), os.write
    full = [True]

    def write(descriptor: int, data: bytes) -> int:
        if full[0] and descriptor == file._descriptor:
            if len(data) > 10:
                return real(descriptor, data[:10])
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr("aim_guardrail.audit.file.os.write", lambda d, data: _short(write, d, data, full))
    trail = Trail(file, "drop", registry=registry)
    await trail.put({"n": 1})
    await asyncio.to_thread(_until, lambda: (registry.get_sample_value("guardrail_audit_failures_total") or 0) > 2)
    assert lines_of(audit) == []  # no half of one
    full[0] = False
    await asyncio.to_thread(_until, lambda: len(lines_of(audit)) == 1)
    await asyncio.to_thread(trail.close)
    assert whole(audit) == 1


def _short(write: Callable[[int, bytes], int], descriptor: int, data: bytes, full: list[bool]) -> int:
    """The first bytes fit, the rest does not."""
    if full[0] and not data.startswith(b'{"seq"'):
        raise OSError(28, "No space left on device")
    return write(descriptor, data)


def test_two_processes_do_not_share_a_file(audit: Path) -> None:
    first = AuditFile(audit, None)
    with pytest.raises(ValueError, match="another process writes to it"):
        AuditFile(audit, None)
    first.close()


def _until(condition: Callable[[], bool]) -> None:
    assert eventually(condition, 10)


def test_refused_requests_come_through_again(predictor: FakePredictor, audit: Path) -> None:
    """Over HTTP: two entries may wait, so each request is told of before the next is taken."""
    flags = ["--audit_file", str(audit), "--audit_overflow", "refuse", "--audit_queue", "2"]
    with guardrail(predictor.host, *flags) as server:
        slow = orders(tokens=["a ", "b ", "c "], token_s=1)
        with httpx.stream("POST", f"{server.url}{CHAT}", json=ask("x", stream=True), headers=slow) as got:
            refused = httpx.post(f"{server.url}{CHAT}", json=ask("hi"))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "audit_backlog"
            assert int(refused.headers["retry-after"]) >= 1
            got.read()
        assert said(events(got)) == "a b c "
        assert eventually(lambda: httpx.post(f"{server.url}{CHAT}", json=ask("hi")).status_code == 200)


# --- the excerpt ----------------------------------------------------------------------------------------------------

FLAGGING = """\
version: 2
name: flagging
prompt: [{type: pii, action: {EMAIL_ADDRESS: flag, CREDIT_CARD: log, default: redact}}, {type: secrets, action: block}]
answer: [{type: pii, action: redact}]
"""


def test_an_excerpt_is_masked_whatever_the_action_and_a_tenant_named(
    predictor: FakePredictor, audit: Path, tmp_path: Path, acme: dict[str, str], keys_file: Path
) -> None:
    (tmp_path / "policy.yaml").write_text(FLAGGING)
    flags = ["--policy", str(tmp_path / "policy.yaml"), "--audit_file", str(audit), "--audit_excerpt", "60"]
    flags += ["--api_keys", str(keys_file), "--audit_tenant", "plain"]
    with guardrail(predictor.host, *flags) as server:
        with httpx.Client(base_url=server.url, timeout=20, headers=acme) as client:
            client.post(CHAT, json=ask(f"I am {MAIL}, card {CARD} and so on, for ever"), headers=orders(say="x" * 100))
            client.post(CHAT, json=ask(f"key {KEY} end"))
            client.post(CHAT, json=ask("hi", stream=True), headers=orders(say=f"write to {MAIL} and on"))
        assert eventually(lambda: len(lines_of(audit)) == 5)
        excerpts = [line["excerpt"] for line in lines_of(audit)]
        assert {line["tenant"] for line in lines_of(audit)} == {"acme"}
    assert excerpts == [
        "I am <EMAIL_ADDRESS_1>, card <CREDIT_CARD_1> and so on, for ever"[:60],
        "x" * 60,
        "key <SECRET_1> end",
        "hi",
        "write to <EMAIL_ADDRESS_1> and on",
    ]
    assert verify(audit)[0] == 0


def test_where_a_whole_text_was_judged_only_its_labels_are_told() -> None:
    policy = shipped_policy("chat")
    excerpts = Excerpts(100)
    excerpts.add("prompt", Slots([Slot("a terrible text")]), [])
    found = Finding("toxicity", "INSULT", 0, 15, 0.9, "model", detector="toxicity", action="flag")
    course = Course(
        "prompt", RequestContext(CHAT), policy, "flag", "flagged", None, [Verdict(findings=(found,))], [], [], 0, 0
    )
    assert excerpts.of(course) == "<INSULT>"
    answered = [Answered("toxicity", "toxicity", "prompt", "flagged", 1.0, 0.0123)]
    fields = entry(course._replace(answered=answered), None, None)
    assert fields["detectors"] == [{"rule": "toxicity", "family": "toxicity", "result": "flagged", "ms": 12.3}]
    assert "terrible" not in str(fields)


def test_a_finding_too_many_is_only_counted() -> None:
    found = tuple(Finding("pii", "EMAIL_ADDRESS", n, n + 1, 1.0, "r", action="flag") for n in range(250))
    context = RequestContext(CHAT)
    course = Course(
        "prompt", context, shipped_policy("chat"), "flag", "flagged", None, [Verdict(findings=found)], [], [], 0, 0
    )
    fields = entry(course, None, None)
    assert (fields["found"], len(fields["findings"])) == (250, 100)


def test_a_detector_asked_too_often_is_only_counted() -> None:
    answered = [Answered("toxicity", "toxicity", "answer", "allowed", 1.0, 0.01) for _ in range(2500)]
    course = Course(
        "answer", RequestContext(CHAT), shipped_policy("chat"), "allow", "allowed", None, [], answered, [], 0, 0
    )
    fields = entry(course, None, None)
    assert (fields["asked"], len(fields["detectors"])) == (2500, 100)
