"""Every fault in one run: what a request comes to is what its policy says, and the audit has a line for each decision.

One process, some 200 requests, eight at once: a judge that hangs, refuses the key or talks nonsense, a classifier that
raises, a budget that is spent, clients that leave, a Redis that is killed, a policy that is broken when it is read
anew, first under a policy that fails closed and then under one that fails open. Each fault by itself is in the files of
its part (`test_stages`, `test_judge_proxy`, `test_traffic_served`, `test_reload`, `test_upstream_failures`, …).
`docs/guardrails-proven.md` has the table, which is this file's.
"""

from __future__ import annotations

import itertools
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import orjson
import pytest

from aim_guardrail.audit.chain import verified
from aim_kserve.kserve import pb, pb_grpc
from fake_judge import HANG, SAFE, FakeJudge
from fake_predictor import FakePredictor
from guarded import ask, events, eventually, metric, orders
from redis_server import RedisServer
from scripted_detectors import __file__ as scripted
from served import Served

pytestmark = pytest.mark.system
PAGE = Path(__file__).parents[2] / "docs/guardrails-proven.md"
CHAT = "/v1/chat/completions"
KEY = "AKIA" + "3XPZ7QKLMN2VWTYB"
AT_ONCE = 8

POLICY = """version: 2
name: ON_FAULT
budget_ms: 2500
on_error: ON_FAULT
on_timeout: ON_FAULT
prompt:
  - {type: traffic, action: block, options: {requests: {minute: 100000}}}
  - {type: secrets, action: block}
  - type: safety
    id: guard
    action: block
    timeout_ms: 600
    options: {judge: llama-guard-3, endpoint: "ENDPOINT", model: guard}
  - {type: scripted, id: classifier, action: block, options: {name: classifier}}
answer:
  - {type: secrets, action: redact}
  - {type: scripted, id: classifier, action: block, options: {name: classifier}}
"""


class Bench:
    """The process and all around it."""

    def __init__(
        self, server: Served, predictor: FakePredictor, judge: FakeJudge, redis: RedisServer, folder: Path
    ) -> None:
        self.server, self.predictor, self.judge, self.redis = server, predictor, judge, redis
        self.policy, self.audit = folder / "policy.yaml", folder / "audit.jsonl"
        self.client = httpx.Client(base_url=server.url, timeout=30)

    def asked_judge(self, name: str) -> bool:
        return any(name in asked["prompt"] for asked in self.judge.asked)

    def asked_predictor(self, name: str) -> bool:
        return any(("x-request-id", name) in seen["headers"] for seen in self.predictor.seen)


def judged(asked: dict[str, Any]) -> Any:
    """What the guard model says: of a text that tells it what to do wrong, that."""
    faults = {"judge-hangs": HANG, "judge-401": 401, "judge-garbage": b"<html>502 Bad Gateway</html>"}
    return next((fault for word, fault in faults.items() if word in asked["prompt"]), SAFE)


# --- what is asked, and what comes of it ------------------------------------------------------------------------------

Asks = Callable[[Bench, str], str]


def seen(answer: httpx.Response) -> str:
    """``503 guardrail_failed``, ``200 degraded guard``: what a client sees."""
    if answer.status_code != 200:
        error = answer.json()["error"]
        return f"{answer.status_code} {error['code'] if isinstance(error, dict) else ''}".rstrip()
    degraded = answer.headers.get("x-guardrail-degraded")
    return f"200 degraded {degraded}" if degraded else "200"


def chat(text: str, say: str = "fine.") -> Asks:
    return lambda bench, name: seen(
        bench.client.post(CHAT, json=ask(text), headers={"x-request-id": name, **orders(say=say)})
    )


def stream(say: str) -> Asks:
    """What ends a stream, where something does, stands behind its status."""

    def asks(bench: Bench, name: str) -> str:
        headers = {"x-request-id": name, **orders(say=say)}
        answer = bench.client.post(CHAT, json=ask("hi", stream=True), headers=headers)
        codes = [event["error"]["code"] for event in events(answer)[:-1] if "error" in event]
        return " ".join([seen(answer), *codes])

    return asks


def v1(text: str) -> Asks:
    return lambda bench, name: seen(
        bench.client.post("/v1/models/m:predict", json={"instances": [text]}, headers={"x-request-id": name})
    )


def filtered(text: str) -> Asks:
    def asks(bench: Bench, name: str) -> str:
        answer = bench.client.post("/filter", json={"text": text}, headers={"x-request-id": name})
        degraded = answer.json().get("degraded")
        return f"200 degraded {','.join(degraded)}" if degraded else seen(answer)

    return asks


def message(text: str) -> Any:
    made = pb.ModelInferRequest(model_name="m")
    made.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
    return made


def over_grpc(text: str) -> Asks:
    def asks(bench: Bench, name: str) -> str:
        with grpc.insecure_channel(bench.server.grpc_url) as channel:
            infer = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            _, call = _result(infer.future(message(text), timeout=30, metadata=[("x-request-id", name)]))
            degraded = dict(call.trailing_metadata()).get("x-guardrail-degraded")
            return f"{call.code().name} degraded {degraded}" if degraded else call.code().name

    return asks


def _result(call: Any) -> tuple[Any, Any]:
    return call.exception(), call


def leaves(text: str, when: Callable[[Bench, str, bytes], bool], *, streams: bool = False, **told: Any) -> Asks:
    """A client that closes its connection as soon as that holds, or has been answered before."""

    def asks(bench: Bench, name: str) -> str:
        body = orjson.dumps(ask(f"{text} {name}", stream=streams))
        told_by = [f"{key}: {value}" for key, value in orders(**told).items()]
        lines = [f"POST {CHAT} HTTP/1.1", "host: t", "content-type: application/json", f"x-request-id: {name}"]
        head = "\r\n".join([*lines, *told_by, f"content-length: {len(body)}", "", ""])
        got = b""
        with socket.create_connection(("127.0.0.1", bench.server.http_port), timeout=30) as connection:
            connection.sendall(head.encode() + body)
            while not when(bench, name, got):
                if select.select([connection], [], [], 0.02)[0]:
                    more = connection.recv(65536)
                    got += more
                    if not more or (got.startswith(b"HTTP/1.1 503") and b"}}" in got):
                        error = orjson.loads(got.partition(b"\r\n\r\n")[2])["error"]
                        return f"503 {error['code']}"
        return "left"

    return asks


def cancels(bench: Bench, name: str) -> str:
    """A gRPC client that takes its call back once the predictor has it."""
    with grpc.insecure_channel(bench.server.grpc_url) as channel:
        metadata = [("x-request-id", name), *orders(hang_after=-1).items()]
        call = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(message("hi"), timeout=30, metadata=metadata)
        while not bench.asked_predictor(name):
            if call.done():
                return str(call.code().name)
            time.sleep(0.02)
        call.cancel()
    return "left"


@dataclass(frozen=True)
class Comes:
    """What a client sees, and what the audit says of prompt and answer; an answer without a line: None."""

    seen: str
    prompt: str
    answer: str | None = None


PASSES = Comes("200", "allowed", "allowed")


def degraded(rule: str, status: str = "200") -> Comes:
    return Comes(f"{status} degraded {rule}", "allowed", "allowed")


def refused(code: str) -> Comes:
    return Comes(f"503 {code}", "error")


@dataclass(frozen=True)
class Case:
    """One kind of request. `closed`, `opened`: what it comes to under the two policies."""

    what: str
    asks: Asks
    closed: Comes
    opened: Comes
    is_limited: bool = True


BEFORE = Comes("left", "client_gone")
WITHIN = Comes("left", "allowed", "client_gone")
FAILED = refused("guardrail_failed")
CASES = [
    Case("nothing is wrong", chat("hi"), PASSES, PASSES),
    Case("a secret in the prompt", chat(f"use {KEY}"), *[Comes("400 content_filter", "blocked")] * 2),
    Case("the judge hangs", chat("judge-hangs"), refused("guardrail_timeout"), degraded("guard")),
    Case("nothing is wrong, streamed", stream("fine."), PASSES, PASSES),
    Case("the judge answers 401", chat("judge-401"), *[refused("guardrail_misconfigured")] * 2),
    Case("the judge answers garbage", chat("judge-garbage"), FAILED, degraded("guard")),
    Case("a secret in the answer", chat("hi", say=f"it is {KEY} ."), *[Comes("200", "allowed", "redacted")] * 2),
    Case("a classifier raises, of a prompt", chat("classifier=fail"), FAILED, degraded("classifier")),
    Case(
        "a classifier raises, of an answer",
        chat("hi", say="classifier=fail"),
        Comes("503 guardrail_failed", "allowed", "error"),
        degraded("classifier"),
    ),
    Case(
        "a classifier raises, of a stream",
        stream("well. classifier=fail it is. "),
        Comes("200 guardrail_failed", "allowed", "error"),
        PASSES,
    ),
    Case("a classifier raises, V1", v1("classifier=fail"), Comes("503", "error"), degraded("classifier")),
    Case(
        "a classifier raises, gRPC",
        over_grpc("classifier=fail"),
        Comes("UNAVAILABLE", "error"),
        degraded("classifier", "OK"),
    ),
    Case(
        "a classifier raises, `/filter`",
        filtered("classifier=fail"),
        FAILED,
        Comes("200 degraded classifier", "allowed"),
        is_limited=False,
    ),
    Case(
        "the budget is spent",
        chat("classifier=sleep:30"),
        refused("guardrail_timeout"),
        degraded("classifier"),
    ),
    Case(
        "the client leaves while its prompt is judged",
        leaves("classifier=sleep:2", lambda bench, name, _: bench.asked_judge(name)),
        *[BEFORE] * 2,
    ),
    Case(
        "the client leaves before the answer",
        leaves("hi", lambda bench, name, _: bench.asked_predictor(name), hang_after=-1),
        *[WITHIN] * 2,
    ),
    Case(
        "the client leaves within the stream",
        leaves("hi", lambda bench, name, got: b"data: " in got, streams=True, say="well " * 200, token_s=0.02),
        *[WITHIN] * 2,
    ),
    Case("the client takes its gRPC call back", cancels, *[WITHIN] * 2),
]


def without_redis(case: Case, fails: str) -> Comes:
    """The same where requests cannot be counted: refused before their bodies are read, or not limited."""
    if not case.is_limited:
        return case.closed if fails == "closed" else case.opened
    if fails == "closed":
        return Comes("UNAVAILABLE" if "gRPC" in case.what else "503" if "V1" in case.what else FAILED.seen, "error")
    comes = case.opened
    if comes.seen.startswith(("200", "OK")):
        status, _, rule = comes.seen.partition(" degraded ")
        return Comes(f"{status} degraded traffic{',' * bool(rule)}{rule}", comes.prompt, comes.answer)
    return comes


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with FakePredictor(grpc=True) as predictor, FakeJudge() as judge, RedisServer() as redis:
        judge.says = judged
        policy, audit = tmp_path / "policy.yaml", tmp_path / "audit.jsonl"
        policy.write_text(policy_of("closed", judge))
        flags = ["--policy", str(policy), "--policy_poll_seconds", "0.05", "--audit_file", str(audit)]
        where = ["--model_name", "m", "--predictor_host", predictor.host, "--redis_url", redis.url]
        with Served([scripted, *where, *flags, "--redis_timeout_ms", "2000"]) as server:
            bench = Bench(server, predictor, judge, redis, tmp_path)
            with bench.client:
                yield bench


def policy_of(fails: str, judge: FakeJudge) -> str:
    return POLICY.replace("ON_FAULT", fails).replace("ENDPOINT", judge.url)


class Run:
    """Requests that were sent: what each should have come to, by its id."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.wrong: list[str] = []
        self.expected: dict[tuple[str, str], tuple[str, str]] = {}
        self.requests = 0
        self.seen: dict[str, str] = {}
        self._numbers = itertools.count()
        self._pool = ThreadPoolExecutor(AT_ONCE)

    def __call__(self, fails: str, rounds: int, comes: Callable[[Case], Comes]) -> None:
        """Send every case so often, and wait for all."""
        list(self._pool.map(lambda case: self._one(case, comes(case), fails), CASES * rounds))

    def _one(self, case: Case, comes: Comes, fails: str) -> None:
        name = f"r{next(self._numbers)}"
        self.requests += 1
        got = self.seen[name] = case.asks(self.bench, name)
        if got.replace("guardrail_budget", "guardrail_timeout") != comes.seen:  # late, or not asked because it would be
            self.wrong.append(f"{name} {case.what}, {fails}: {got}, not {comes.seen}")
        for direction, outcome in (("prompt", comes.prompt), ("answer", comes.answer)):
            if outcome is not None:
                self.expected[name, direction] = (outcome, fails)


def closed(case: Case) -> Comes:
    return case.closed


def opened(case: Case) -> Comes:
    return case.opened


def test_every_fault_comes_to_what_its_policy_says_and_is_audited(bench: Bench) -> None:
    run, server = Run(bench), bench.server
    run("closed", 2, closed)
    bench.policy.write_text(policy_of("open", bench.judge).replace("action: redact", "action: censor"))
    run("closed", 2, closed)  # while the broken policy is read, and after it
    assert eventually(lambda: metric(server, "guardrail_policy_reload_total", result="invalid") == 1)
    bench.redis.kill()
    run("closed", 2, lambda case: without_redis(case, "closed"))
    bench.redis.start()

    bench.policy.write_text(policy_of("open", bench.judge))
    assert eventually(lambda: metric(server, "guardrail_policy_info", name="open") == 1)
    time.sleep(1.1)  # Redis is not asked before
    run("open", 4, opened)
    bench.redis.kill()
    run("open", 2, lambda case: without_redis(case, "open"))

    assert run.wrong == [], "\n".join(run.wrong)
    assert run.requests == 12 * len(CASES) > 200
    assert eventually(lambda: bench.audit.read_bytes().count(b"\n") >= len(run.expected), 10)
    time.sleep(0.2)  # none too many either
    told = bench.audit.read_bytes().splitlines(keepends=True)
    lines = [orjson.loads(line) for line in told]
    by_decision = [((line["request_id"], line["direction"]), (line["outcome"], line["policy"])) for line in lines]
    assert {key: (outcome, policy.split("/")[0]) for key, (outcome, policy) in by_decision} == run.expected
    assert max(Counter(key for key, _ in by_decision).values()) == 1
    for line in lines:
        assert_is_told(line, run.seen[line["request_id"]])
    assert verified(told, None)[0] == len(run.expected)
    assert metric(server, "guardrail_audit_dropped_total") == 0

    assert eventually(lambda: bench.judge.open == 0 and bench.predictor.open == 0)  # nobody waits for who has left
    server.terminate()
    assert server.exit_code() == 0
    for unhandled in ("Traceback", "never retrieved", "never awaited", "Exception ignored", "Unhandled", "internal"):
        assert unhandled not in server.stderr()


def assert_is_told(line: dict[str, Any], seen: str) -> None:
    """The audit names what the client was told: the error's code, the rules that gave no answer."""
    _, _, rest = seen.partition(" ")
    if line["outcome"] == "error":
        assert line["error"] == (rest or "guardrail_failed")  # V1 and gRPC have no codes
    elif rest.startswith("degraded ") and line["direction"] == "answer":
        assert set(line["degraded"]) >= set(rest.removeprefix("degraded ").split(","))  # a stream may have more


# --- the table --------------------------------------------------------------------------------------------------------


def cell(comes: Comes) -> str:
    audit = f"prompt {comes.prompt}" + (f", answer {comes.answer}" if comes.answer else "")
    return f"{comes.seen}; {audit}"


def table() -> list[str]:
    """As the page has it."""
    rows = ["| what happens | fails closed | fails open |", "|---|---|---|"]
    rows += [f"| {case.what} | {cell(case.closed)} | {cell(case.opened)} |" for case in CASES]
    sound = CASES[0]
    without = [cell(without_redis(sound, fails)) for fails in ("closed", "open")]
    return [*rows, f"| Redis is killed, and nobody knows the replicas' share | {' | '.join(without)} |"]


def test_the_page_has_this_table() -> None:
    lines = PAGE.read_text().splitlines()
    start = lines.index(table()[0])
    assert lines[start : start + len(table()) + 1] == [*table(), ""]
