"""Limits through the real process: HTTP, streams and gRPC, counted in a real Redis, which may be away."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import orjson
import pytest

import fake_predictor
from aim_guardrail.policy import parse_policy
from aim_guardrail.traffic.shared import RETRY_AFTER_S
from aim_kserve.identity import keys
from aim_kserve.kserve import pb, pb_grpc
from fake_predictor import FakePredictor
from guarded import ask, events, eventually, guardrail, metric, orders, said
from mmdb import write_countries
from redis_server import RedisServer
from served import Served

pytestmark = pytest.mark.system
CHAT = "/v1/chat/completions"
KEY = "AKIA" + "3XPZ7QKLMN2VWTYB"
RATE_HEADERS = [
    f"x-ratelimit-{what}-{unit}" for unit in ("requests", "tokens") for what in ("limit", "remaining", "reset")
]


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def shared(predictor: FakePredictor, redis: RedisServer, tmp_path_factory: Any) -> Iterator[tuple[Served, Path]]:
    """One process for all tests that need no flags of their own, and the file of its policy."""
    directory = tmp_path_factory.mktemp("shared")
    with serving(predictor, redis, directory / "policy.yaml", "--geo_database", countries(directory)) as server:
        yield server


@pytest.fixture(scope="module")
def other(predictor: FakePredictor, redis: RedisServer, tmp_path_factory: Any) -> Iterator[tuple[Served, Path]]:
    """A second replica beside it, which is audited and trusts a proxy."""
    directory = tmp_path_factory.mktemp("other")
    flags = ["--limit_replicas", "2", "--audit_file", str(directory / "audit.jsonl")]
    flags += ["--geo_database", countries(directory), "--trusted_proxies", "127.0.0.1"]
    with serving(predictor, redis, directory / "policy.yaml", *flags) as server:
        yield server


def countries(directory: Path) -> str:
    return str(write_countries(directory / "geo.mmdb", {"203.0.113.0/24": "DE", "198.51.100.0/24": "US"}))


@contextmanager
def serving(predictor: FakePredictor, redis: RedisServer, file: Path, *flags: str) -> Iterator[tuple[Served, Path]]:
    file.write_text(policy_of("{requests: {minute: 1}}"))
    common = ["--redis_url", redis.url, "--redis_timeout_ms", "2000", "--policy_poll_seconds", "0.05"]
    with guardrail(predictor.host, "--policy", str(file), *common, *flags) as server:
        yield server, file


def policy_of(options: str, action: str = "block", more: str = "") -> str:
    rule = f"  - type: traffic\n    action: {action}\n    options: {options}\n"
    return f"version: 2\nname: p\nprompt:\n{rule}{more}"


@pytest.fixture
def limited(predictor: FakePredictor, redis: RedisServer, shared: tuple[Served, Path], tmp_path: Path) -> Any:
    """``with limited(options, …) as (server, client)``: one traffic rule, an empty Redis. With flags it is a process of
    its own, else the shared one or ``at``."""
    redis.ask(b"FLUSHALL")

    @contextmanager
    def serve(
        options: str, *flags: str, at: tuple[Served, Path] = shared, **rest: str
    ) -> Iterator[tuple[Served, httpx.Client]]:
        text = policy_of(options, **rest)
        with ExitStack() as stack:
            if flags:
                file = tmp_path / "policy.yaml"
                file.write_text(text)
                url = [] if "--redis_url" in flags else ["--redis_url", redis.url, "--redis_timeout_ms", "2000"]
                server = stack.enter_context(guardrail(predictor.host, "--policy", str(file), *url, *flags))
            else:
                server, file = at
                file.write_text(text)
                version = parse_policy(text, "p").version_hash
                assert eventually(lambda: metric(server, "guardrail_policy_info", version=version), 20)
            yield server, stack.enter_context(httpx.Client(base_url=server.url, timeout=20))

    return serve


@contextmanager
def counted(server: Served, name: str, by: float, **labels: str) -> Iterator[None]:
    """``with``: a metric grows by so much."""
    before = metric(server, name, **labels)
    yield
    assert metric(server, name, **labels) - before == by


def used(redis: RedisServer) -> int:
    """What all counts hold together."""
    keys = redis.ask(b"KEYS aim:limit:*").split(b"\r\n")[2::2]
    return sum(int(value) for key in keys for value in redis.ask(b"HVALS " + key).split(b"\r\n")[2::2])


# --- requests -------------------------------------------------------------------------------------------------------


def test_requests_a_minute(limited: Any, predictor: FakePredictor) -> None:
    with (
        limited("{requests: {minute: 3, hour: 100}}") as (server, client),
        counted(server, "guardrail_ratelimit_total", 3, limit="requests_minute", result="allow"),
        counted(server, "guardrail_ratelimit_total", 4, limit="requests_minute", result="block"),
        counted(server, "guardrail_requests_total", 4, decision="block"),
    ):
        told = orders(headers={"x-ratelimit-limit-requests": "9999", "content-type": "application/json"})
        allowed = [client.post(CHAT, json=ask("hi"), headers=told) for _ in range(3)]
        assert [each.status_code for each in allowed] == [200, 200, 200]
        assert [each.headers["x-ratelimit-remaining-requests"] for each in allowed] == ["2", "1", "0"]
        assert {each.headers["x-ratelimit-limit-requests"] for each in allowed} == {"3"}  # the predictor's is dropped
        assert all(re.fullmatch(r"1m[01]s|[345]\ds", each.headers["x-ratelimit-reset-requests"]) for each in allowed)
        assert "x-ratelimit-limit-tokens" not in allowed[0].headers
        seen = len(predictor.seen)
        refused = client.post(CHAT, json=ask("hi"))
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        wait = int(refused.headers["retry-after"])
        assert 30 <= wait <= 61
        assert error["message"] == f"the limit is 3 requests a minute for you: ask again in {wait} s"
        assert refused.headers["x-guardrail-verdict"] == "block"
        assert refused.headers["x-guardrail-families"] == "traffic"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert len(predictor.seen) == seen
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0) as told_by,
            pytest.raises(openai.RateLimitError),
        ):
            told_by.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        says = re.compile(r"the limit is 3 requests a minute for you: ask again in \d+ s")
        assert says.fullmatch(client.post("/v1/models/m:predict", json={"instances": ["hi"]}).json()["error"])
        answer = client.post("/v2/models/m/infer", json={"inputs": []})
        assert (answer.status_code, list(answer.json())) == (429, ["error"])
        assert says.fullmatch(answer.json()["error"])
        of_it = {"request_id": refused.headers["x-request-id"], "verdict": "block"}.items()
        assert eventually(
            lambda: any(of_it <= {k: str(v) for k, v in line.items()}.items() for line in server.access_lines())
        )


def test_probes_and_metrics_are_not_limited(limited: Any) -> None:
    with limited("{requests: {minute: 1, per: global}}") as (_, client):
        assert client.post(CHAT, json=ask("hi")).status_code == 200
        for path in ("/v2/health/ready", "/v2/models/m/ready", "/metrics"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/models").status_code == 429


def test_replicas_count_together(limited: Any, other: tuple[Served, Path]) -> None:
    with limited("{requests: {minute: 3}}") as (_, one), limited("{requests: {minute: 3}}", at=other) as (_, two):
        statuses = [client.post(CHAT, json=ask("hi")).status_code for client in (one, two, one, two, one)]
        assert statuses == [200, 200, 200, 429, 429]


def test_tenants_are_counted_each_for_itself(limited: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"

    def bearer(name: str, tenant: str) -> dict[str, str]:
        text, entry = keys.new_key(name, tenant=tenant)
        keys.add(file, entry)
        return {"authorization": f"Bearer {text}"}

    acme, again, beta = bearer("one", "acme"), bearer("two", "acme"), bearer("three", "beta")
    with limited("{requests: {minute: 2}}", "--api_keys", str(file)) as (_, client):
        statuses = [client.post(CHAT, json=ask("hi"), headers=each).status_code for each in (acme, again, acme, beta)]
        assert statuses == [200, 200, 429, 200]
        assert client.post(CHAT, json=ask("hi")).status_code == 401


def test_made_up_models_share_one_count(limited: Any) -> None:
    with limited("{requests: {minute: 2, per: caller_model}}") as (_, client):

        def ask_for(model: str, **told: Any) -> int:
            body = {**ask("hi"), "model": model}
            return client.post(CHAT, json=body, headers=orders(**told)).status_code

        assert [ask_for("m"), ask_for("m"), ask_for("m")] == [200, 200, 429]
        assert [ask_for(f"made-up-{n}", status=404) for n in range(4)] == [404, 404, 429, 429]


def test_a_flag_lets_pass(limited: Any) -> None:
    with (
        limited("{requests: {minute: 1}}", action="{REQUEST_RATE: flag}") as (server, client),
        counted(server, "guardrail_ratelimit_total", 2, result="flag"),
    ):
        verdicts = [client.post(CHAT, json=ask("hi")).headers["x-guardrail-verdict"] for _ in range(3)]
        assert verdicts == ["allow", "flag", "flag"]


def test_a_refusal_is_audited_as_a_block(limited: Any, other: tuple[Served, Path]) -> None:
    audit = other[1].with_name("audit.jsonl")

    def audited() -> list[dict[str, Any]]:
        lines = map(orjson.loads, audit.read_bytes().splitlines())
        return [line for line in lines if line["request_id"] in ("audited-1", "audited-2")]

    with limited("{requests: {minute: 1}}", at=other) as (_, client):
        answers = [client.post(CHAT, json=ask("hi"), headers={"x-request-id": f"audited-{n}"}) for n in (1, 2)]
        assert [each.status_code for each in answers] == [200, 429]
        assert eventually(lambda: len(audited()) == 3)
    lines = audited()
    outcomes = [(line["direction"], line["outcome"]) for line in lines]
    assert outcomes == [("prompt", "allowed"), ("answer", "allowed"), ("prompt", "blocked")]
    (found,) = lines[2]["findings"]
    assert (found["family"], found["label"], found["by"]) == ("traffic", "REQUEST_RATE", "requests_minute")


# --- what a body is not needed for ------------------------------------------------------------------------------------


def begun(server: Served, *headers: str) -> bytes:
    """The answer to a request whose body does not come."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = [f"POST {CHAT} HTTP/1.1", "host: t", "content-type: application/json", *headers, "", ""]
        connection.sendall("\r\n".join(head).encode())
        return connection.recv(65536)


def test_refused_before_the_body_is_read(limited: Any) -> None:
    with limited("{requests: {minute: 1}, upload_bytes: 1000}") as (server, client):
        told = begun(server, "content-length: 1001")
        assert told.startswith(b"HTTP/1.1 413 ")
        assert b"the body has 1001 bytes and may have 1000: shorten it" in told
        assert client.post(CHAT, json=ask("hi")).status_code == 200  # what was refused has used nothing
        assert begun(server, "content-length: 500").startswith(b"HTTP/1.1 429 ")


def test_a_body_of_unknown_length_is_measured(limited: Any) -> None:
    with limited("{requests: {minute: 9}, upload_bytes: 1000}") as (_, client):
        answer = client.post(CHAT, content=iter([b'{"prompt": "', b"x" * 2000, b'"}']))
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "upload_too_large"
        assert client.post(CHAT, json=ask("hi")).headers["x-ratelimit-remaining-requests"] == "8"


def test_context_length(limited: Any) -> None:
    with limited("{context_tokens: 100}") as (_, client):
        assert client.post(CHAT, json=ask("x" * 300)).status_code == 200
        answer = client.post(CHAT, json=ask("x" * 500))
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "may have 100: shorten it" in answer.json()["error"]["message"]


def test_countries_by_proxies_that_are_trusted(limited: Any, other: tuple[Served, Path]) -> None:
    options = "{countries: {allow: [DE]}}"
    with limited(options, at=other) as (server, client):

        def from_(address: str | None) -> httpx.Response:
            forwarded = {} if address is None else {"x-forwarded-for": address}
            return client.post(CHAT, json=ask("hi"), headers={"x-request-id": "from", **forwarded})

        def logged() -> list[str]:
            return [line["client"] for line in server.access_lines() if line["request_id"] == "from"]

        assert from_("203.0.113.5").status_code == 200
        refused = from_("203.0.113.5, 198.51.100.9")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "country_not_allowed")
        assert refused.json()["error"]["message"] == "requests from US are not served"
        assert from_(None).status_code == 403  # from this machine: no known country
        clients = ["203.0.113.5", "198.51.100.9", "127.0.0.1"]
        assert eventually(lambda: logged() == clients), logged()
    with limited(options) as (_, client):
        assert from_("203.0.113.5").status_code == 403  # nobody is believed


def test_a_database_that_cannot_be_read_ends_the_start(limited: Any, tmp_path: Path) -> None:
    (tmp_path / "geo.mmdb").write_text("none")
    flags = ("--geo_database", str(tmp_path / "geo.mmdb"))
    says = r"geo_database .*geo.mmdb: cannot be read .* give a MaxMind database"
    with pytest.raises(RuntimeError, match=says), limited("{countries: {allow: [DE]}}", *flags):
        raise AssertionError("it serves")


def test_outside_business_hours(limited: Any) -> None:
    days = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
    later = days[(time.gmtime().tm_wday + 3) % 7]
    with limited(f"{{hours: {{days: [{later}]}}}}") as (_, client):
        answer = client.post(CHAT, json=ask("hi"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "outside_hours")
        assert 2 * 86400 - 60 <= int(answer.headers["retry-after"]) <= 3 * 86400
        assert later in answer.json()["error"]["message"]


# --- tokens -----------------------------------------------------------------------------------------------------------

TOKENS = "{tokens: {minute: 100000}}"
CHECKED = "answer: [{type: secrets, action: redact}]\n"
BUFFERED = CHECKED + "stream: {mode: buffer}\n"


@pytest.mark.parametrize("more", ["", CHECKED])
def test_tokens_are_reserved_and_settled(limited: Any, redis: RedisServer, more: str) -> None:
    with limited(TOKENS, more=more) as (_, client):
        answer = client.post(CHAT, json=ask("x" * 400, max_tokens=1000))
        assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
        assert 98_800 <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= 98_900
        assert eventually(lambda: used(redis) == 12)  # its usage


@pytest.mark.parametrize("more", ["", CHECKED, BUFFERED])
def test_a_streams_usage_settles(limited: Any, redis: RedisServer, more: str) -> None:
    with limited(TOKENS, more=more) as (_, client):
        body = ask("hi", stream=True, stream_options={"include_usage": True})
        answer = client.post(CHAT, json=body, headers=orders(say="one two three four"))
        assert said(events(answer)) == "one two three four"
        assert eventually(lambda: used(redis) == 5 + 4)


@pytest.mark.parametrize("more", ["", CHECKED])
def test_who_leaves_before_the_usage_has_paid_for_what_came(limited: Any, redis: RedisServer, more: str) -> None:
    """Row 11: the whole answer is read, and the client leaves before the chunk that tells what it cost."""
    text = " ".join(f"word{n}" for n in range(60))
    body = ask("x" * 400, stream=True, stream_options={"include_usage": True})
    frames = list(fake_predictor._stream(CHAT, body, {"say": text}))
    told = orders(say=text, hang_after=sum(map(len, frames[:-2])))
    with limited(TOKENS, more=more) as (_, client):
        for asked in (1, 2):
            got = b""
            with client.stream("POST", CHAT, json=body, headers=told) as answer:
                for chunk in answer.iter_bytes():
                    got += chunk
                    if b'"finish_reason":"stop"' in got:
                        break
            assert b"word59" in got
            # 102 tokens of the prompt, and 409 bytes of the answer, four a token.
            assert eventually(lambda asked=asked: 200 * asked <= used(redis) <= 212 * asked)


def test_who_always_leaves_early_reaches_the_limit(limited: Any) -> None:
    told = orders(say="word " * 100, token_s=0.001)
    with limited("{tokens: {minute: 500}}") as (_, client):
        statuses = []
        for _ in range(8):
            with client.stream("POST", CHAT, json=ask("x" * 400, stream=True, max_tokens=100), headers=told) as answer:
                statuses.append(answer.status_code)
                next(answer.iter_bytes())
        assert 200 in statuses
        assert statuses[-1] == 429


@pytest.mark.parametrize(
    ("text", "told"),
    [("hi", {"status": 500, "body": "{}"}), ("hi", {"drop_after": 0}), (f"key {KEY}", {})],
    ids=["an error", "no answer", "blocked"],
)
def test_what_fails_gives_its_tokens_back(limited: Any, redis: RedisServer, text: str, told: dict[str, Any]) -> None:
    with limited(TOKENS, more="  - {type: secrets, action: block}\n") as (_, client):
        answer = client.post(CHAT, json=ask(text, max_tokens=500), headers=orders(**told))
        assert answer.status_code >= 400
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 100_000
        assert eventually(lambda: used(redis) == 0)


def test_a_limit_that_refuses_takes_nothing_of_the_others(limited: Any, redis: RedisServer) -> None:
    with limited("{requests: {minute: 100}, tokens: {minute: 1000}}") as (_, client):
        answer = client.post(CHAT, json=ask("hi", max_tokens=5000))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (429, "request_too_large")
        assert "shorten it or lower max_tokens" in error["message"]
        assert "retry-after" not in answer.headers
        assert eventually(lambda: used(redis) == 0)
        assert client.post(CHAT, json=ask("hi", max_tokens=900)).status_code == 200
        assert answer.headers["x-ratelimit-remaining-tokens"] == "1000"


# --- gRPC -------------------------------------------------------------------------------------------------------------


async def infer(server: Served, **parameters: int) -> tuple[str, dict[str, str], str]:
    """Its status code, trailing metadata and details."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="prompt", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"x" * 400)
    request = pb.ModelInferRequest(model_name="m", inputs=[tensor])
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    async with grpc.aio.insecure_channel(server.grpc_url) as channel:
        call = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=20)
        code = await call.code()
        return code.name, dict(await call.trailing_metadata()), await call.details()


async def test_over_grpc(limited: Any, redis: RedisServer) -> None:
    with limited("{requests: {minute: 2}, tokens: {minute: 10000}}") as (server, _):
        code, told, _ = await infer(server, max_tokens=100)
        assert code == "OK"
        assert [told[name] for name in RATE_HEADERS if "reset" not in name] == ["2", "1", "10000", "9800"]
        assert eventually(lambda: used(redis) == 1 + 200)  # the echo is as long as the prompt
        await infer(server)
        code, told, details = await infer(server)
        assert code == "RESOURCE_EXHAUSTED"
        assert 30 <= int(told["retry-after"]) <= 61
        assert told["x-guardrail-verdict"] == "block"
        assert details.startswith("the limit is 2 requests a minute for you: ask again in")


async def test_sizes_over_grpc(limited: Any) -> None:
    with limited("{context_tokens: 10}") as (server, _):
        assert (await infer(server))[0] == "INVALID_ARGUMENT"
    with limited("{upload_bytes: 10}") as (server, _):
        assert (await infer(server))[0] == "RESOURCE_EXHAUSTED"


# --- Redis is away ----------------------------------------------------------------------------------------------------


def test_redis_killed_in_the_middle(limited: Any, redis: RedisServer, other: tuple[Served, Path]) -> None:
    by = counted(other[0], "guardrail_ratelimit_without_redis_total", 6, outcome="local")
    with limited("{requests: {minute: 8}}", at=other) as (server, client):
        assert client.post(CHAT, json=ask("hi")).status_code == 200
        redis.kill()
        try:
            with by:
                answers = [client.post(CHAT, json=ask("hi")) for _ in range(6)]
            assert [each.status_code for each in answers] == [200, 200, 200, 200, 429, 429]  # half of eight
            assert answers[0].headers["x-ratelimit-limit-requests"] == "4"
        finally:
            redis.start()
        assert eventually(lambda: client.post(CHAT, json=ask("hi")).headers["x-ratelimit-limit-requests"] == "8")
        assert "Traceback" not in server.stderr()


@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_without_redis_the_policy_decides(limited: Any, redis: RedisServer, on_error: str) -> None:
    with (
        limited("{requests: {minute: 8}, tokens: {minute: 9000}}", more=f"on_error: {on_error}\n") as (server, client),
        counted(server, "guardrail_ratelimit_without_redis_total", 1 if on_error == "closed" else 2, outcome=on_error),
    ):
        redis.kill()
        try:
            answer = client.post(CHAT, json=ask("hi"))
            if on_error == "closed":
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guardrail_failed")
                assert "'traffic' failed" in answer.json()["error"]["message"]
            else:
                assert (answer.status_code, answer.headers["x-guardrail-degraded"]) == (200, "traffic")
        finally:
            redis.start()
            time.sleep(RETRY_AFTER_S)  # Redis is not asked before
        assert "x-ratelimit-limit-tokens" in client.post(CHAT, json=ask("hi")).headers


def test_redis_that_hangs_holds_nobody_up(limited: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        with limited("{requests: {minute: 80}}", "--redis_url", url, "--limit_replicas", "1") as (server, client):
            for _ in range(10):
                assert client.post(CHAT, json=ask("hi")).status_code == 200
            assert metric(server, "guardrail_ratelimit_without_redis_total", outcome="local") == 10
            assert server.stderr().count("Redis does not count") <= 3


def test_promtool_finds_nothing_to_say(limited: Any) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing: make system-deps")
    with limited("{requests: {minute: 1}}") as (server, client):
        client.post(CHAT, json=ask("hi"))
        client.post(CHAT, json=ask("hi"))
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    ours = "\n".join(line for line in lines if "guardrail_ratelimit" in line) + "\n"
    check = subprocess.run(["promtool", "check", "metrics"], input=ours, text=True, capture_output=True, check=False)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
