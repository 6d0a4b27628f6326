"""What both processes, the runtime's server and the transformer, refuse, survive and say at their HTTP edge."""

from __future__ import annotations

import gzip
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import orjson
import pytest

from aim_kserve.kserve import pb, pb_grpc
from fake_predictor import FakePredictor
from guarded import ask, eventually, guardrail, metric, orders
from served import Served

ORIGIN = "https://chat.example"
FLAGS = ("--max_body_mib", "0.01", "--timeout_receive", "1", "--cors_origins", f"{ORIGIN},http://localhost:3000")
OPENAI = ["/v1/chat/completions", "/openai/v1/completions", "/v1/tokenize"]
KSERVE = ["/v1/models/m:predict", "/v2/models/m/infer"]
INFER = {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["hi"]}]}


@pytest.fixture(scope="module")
def predictor() -> Iterator[FakePredictor]:
    with FakePredictor() as predictor:
        yield predictor


@pytest.fixture(scope="module")
def servers(predictor: FakePredictor) -> Iterator[dict[str, Served]]:
    with Served.fake(*FLAGS) as runtime, guardrail(predictor.host, *FLAGS) as transformer:
        yield {"runtime": runtime, "guardrail": transformer}


@pytest.fixture(scope="module", params=["runtime", "guardrail"])
def server(request: pytest.FixtureRequest, servers: dict[str, Served]) -> Served:
    return servers[request.param]


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def error_of(answer: httpx.Response, path: str) -> str:
    """The message, where the error has the shape that the clients of ``path`` parse."""
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    if path in KSERVE:
        return str(error)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return str(error["message"])


# --- bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*OPENAI, *KSERVE])
def test_a_body_too_large_is_a_413(client: httpx.Client, path: str) -> None:
    body = orjson.dumps({"prompt": "x" * 11_000})
    for content in (body, iter([body[:6000], body[6000:]])):  # with its length, and in chunks of unknown number
        answer = client.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert "larger than 10485 bytes: shorten it or raise --max_body_mib" in error_of(answer, path)


@pytest.mark.parametrize("path", [*OPENAI, *KSERVE])
@pytest.mark.parametrize(
    ("headers", "body", "says"),
    [
        ({"content-encoding": "gzip"}, gzip.compress(b"{}"), "content-encoding: 'gzip' is not taken"),
        ({"content-encoding": "deflate"}, zlib.compress(b"0" * 10**7), "content-encoding: 'deflate' is not taken"),
        ({"content-type": "application/x-www-form-urlencoded"}, b"a=b&c=d", "'application/x-www-form-urlencoded'"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n\r\n--x--", "'multipart/form-data' is not"),
        ({"content-type": "text/plain"}, b"hello", "'text/plain' is not taken: send JSON"),
        ({"content-type": "application/octet-stream"}, b"{}", "'application/octet-stream' is not taken"),
    ],
    ids=["gzip", "bomb", "form", "multipart", "text", "octets"],
)
def test_what_is_not_json_is_a_415(
    client: httpx.Client, path: str, headers: dict[str, str], body: bytes, says: str
) -> None:
    answer = client.post(path, content=body, headers=headers)
    assert answer.status_code == 415
    assert says in error_of(answer, path)
    assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "application/json", "", None])
def test_json_passes_as_curl_labels_it(client: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind, "content-encoding": "identity"}
    for path, body in ((OPENAI[0], ask("hi")), (KSERVE[0], {"instances": ["hi"]})):
        answer = client.post(path, content=b" " + orjson.dumps(body), headers=headers)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("length", ["x", "-1", "1_0", "+5", "", "99999999999999999999999", "100000", "1.0"])
def test_a_json_length_that_is_none_is_a_400(client: httpx.Client, length: str) -> None:
    headers = {"inference-header-content-length": length, "content-type": "application/octet-stream"}
    answer = client.post(KSERVE[1], content=orjson.dumps(INFER), headers=headers)
    assert answer.status_code == (415 if length == "" else 400)
    assert isinstance(answer.json()["error"], str)


# --- browsers -------------------------------------------------------------------------------------------------------


def preflight(client: httpx.Client, origin: str) -> httpx.Response:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return client.options(OPENAI[0], headers={"origin": origin, **asks})


def test_pages_of_the_origins_given_may_call(client: httpx.Client) -> None:
    for origin in (ORIGIN, "http://localhost:3000"):
        answer = preflight(client, origin)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"]
        for path, body in ((OPENAI[0], ask("hi")), (OPENAI[0], []), (KSERVE[0], {"instances": ["hi"]})):
            got = client.post(path, json=body, headers={"origin": origin})
            assert got.headers["access-control-allow-origin"] == origin


def test_pages_of_others_may_not(client: httpx.Client) -> None:
    assert preflight(client, "https://evil.example").status_code == 400
    got = client.post(OPENAI[0], json=ask("hi"), headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in got.headers


# --- clients that do not finish -------------------------------------------------------------------------------------


def said_to(server: Served, *pieces: bytes) -> tuple[int, Any]:
    """What a client is told that sends these pieces and waits; (0, None) where its connection is closed in silence."""
    with socket.create_connection(("127.0.0.1", server.http_port), 30) as client:
        for piece in pieces:
            client.sendall(piece)
        got = b""
        while more := client.recv(65536):
            got += more
    head, _, body = got.partition(b"\r\n\r\n")
    return (int(head.split()[1]), orjson.loads(body)) if got else (0, None)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("pieces", [[HEAD[:3]], [HEAD], [HEAD, b"x-a: 1\r\n"]])
def test_a_head_that_does_not_end(server: Served, pieces: list[bytes]) -> None:
    status, body = said_to(server, *pieces)
    assert (status, body["error"]["type"]) == (408, "invalid_request_error")
    assert "did not come within 1 s" in body["error"]["message"]


def test_a_body_that_does_not_end(server: Served) -> None:
    assert said_to(server, HEAD + b"content-length: 100\r\n\r\n", b'{"messages": ')[0] == 408


def test_a_client_that_says_nothing(server: Served) -> None:
    assert said_to(server) == (0, None)


def test_a_head_without_bounds(server: Served) -> None:
    status, body = said_to(server, HEAD, *[b"x-filler: " + b"x" * 1000 + b"\r\n"] * 65)
    assert status == 431
    assert "larger than 65536 bytes" in body["error"]["message"]


def told_while_sending(server: Served, first: bytes, pause_s: float, more: bytes) -> tuple[int, Any]:
    """What a client is told that looks for it only when it has sent all."""
    with socket.create_connection(("127.0.0.1", server.http_port), 30) as client:
        client.sendall(first)
        time.sleep(pause_s)
        for at in range(0, len(more), 8192):
            client.sendall(more[at : at + 8192])
            time.sleep(0.002)
        got = b""
        while more := client.recv(65536):
            got += more
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), orjson.loads(body)


def test_who_still_sends_is_told_all_the_same(server: Served) -> None:
    """Closing a connection with unread data resets it, and the client's system throws away what had come."""
    body = HEAD + b"content-length: 1000000\r\n\r\n{"
    status, told = told_while_sending(server, body, 1.5, b" " * 500_000)
    assert (status, told["error"]["type"]) == (408, "invalid_request_error")
    status, told = told_while_sending(server, HEAD, 0, b"x-filler: " + b"x" * 500_000)
    assert (status, told["error"]["type"]) == (431, "invalid_request_error")
    status, told = told_while_sending(server, b"nonsense\r\n", 0, b"x" * 500_000)
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")


def test_who_sends_for_ever_is_left(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.http_port), 30) as client:
        client.sendall(b"nonsense\r\n")
        started = time.monotonic()

        def send_on() -> None:
            while time.monotonic() < started + 20:
                client.sendall(b"x" * 8192)
                time.sleep(0.01)

        with pytest.raises(ConnectionError):
            send_on()


def test_an_upgrade_that_is_not_taken_changes_nothing(server: Served) -> None:
    """Java's own client offers HTTP/2 with its first request, body and all."""
    body = orjson.dumps(ask("hi"))
    offer = (
        b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.http_port), 30) as client:
        client.sendall(HEAD + offer + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_who_takes_pauses_is_served(server: Served) -> None:
    """Longer than the patience in all, but no pause is."""
    body = orjson.dumps(ask("hi"))
    head = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)

    with socket.create_connection(("127.0.0.1", server.http_port), 30) as client:
        client.sendall(head)
        for at in range(0, len(body), 15):
            time.sleep(0.3)
            client.sendall(body[at : at + 15])
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_heads_and_bodies_come_whole(server: Served) -> None:
    """However our answers' heads and bodies are written: asked for alone, asked for permission, one after the other."""
    body = orjson.dumps(ask("hi"))
    with socket.create_connection(("127.0.0.1", server.http_port), 30) as client, client.makefile("rb") as answers:
        client.sendall(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body))
        assert answers.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert answers.readline() == b"\r\n"
        client.sendall(body)
        for turn in range(3):  # the last two are asked for in one go
            status, length = answers.readline(), 0
            while (line := answers.readline()) != b"\r\n":
                length = int(line[16:]) if line.startswith(b"content-length: ") else length
            assert status == b"HTTP/1.1 200 OK\r\n"
            assert orjson.loads(answers.read(length))["choices"]
            if turn == 0:
                client.sendall((HEAD + b"content-length: %d\r\n\r\n" % len(body) + body) * 2)
        client.sendall(b"HEAD /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert answers.read().startswith(b"HTTP/1.1 200")


# --- the end --------------------------------------------------------------------------------------------------------


def ended_with(server: Served, told: dict[str, str], in_flight: Callable[[], float]) -> list[httpx.Response]:
    """A stream, a chat and a V1 prediction in flight, and a SIGTERM: what each is answered."""
    slow = {**ask("word " * 500), "max_tokens": 100_000, "fake": {"token_s": 0.05}}
    predict = {"instances": ["hi"], "parameters": {"max_tokens": 100_000}}
    asked = [(OPENAI[0], {**slow, "stream": True}), (OPENAI[0], slow), (KSERVE[0], predict)]
    headers = [orders(token_s=0.05), told, told]
    with ThreadPoolExecutor(3) as pool:
        asking = [
            pool.submit(httpx.post, server.url + path, json=body, headers=head, timeout=30)
            for (path, body), head in zip(asked, headers, strict=True)
        ]
        assert eventually(lambda: in_flight() == 3)
        server.terminate()
        return [item.result() for item in asking]


@pytest.mark.parametrize("which", ["runtime", "guardrail"])
def test_who_outlasts_the_grace_period_is_told(which: str, predictor: FakePredictor) -> None:
    if which == "runtime":
        start, gauge = Served.fake("--grace_period", "1", token_s=0.05), "aim_requests_running"
    else:
        start, gauge = guardrail(predictor.host, "--grace_period", "1"), "guardrail_upstream_connections"
    with start as server:
        stream, chat, predict = ended_with(server, orders(hang_after=-1), lambda: metric(server, gauge))
        *_, error, done = [line for line in stream.text.split("\n\n") if line]
        assert orjson.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"
        assert (chat.status_code, chat.json()["error"]["code"]) == (503, "shutting_down")
        assert predict.status_code == 503
        assert "the server shut down before" in predict.json()["error"]
        assert server.exit_code(10) == 0
        assert "Traceback" not in server.stderr()


@pytest.mark.parametrize("path", [OPENAI[0], *KSERVE])
@pytest.mark.parametrize("which", ["runtime", "guardrail"])
def test_whose_body_outlasts_the_grace_period_is_told(which: str, path: str, predictor: FakePredictor) -> None:
    start = (
        Served.fake("--grace_period", "1") if which == "runtime" else guardrail(predictor.host, "--grace_period", "1")
    )
    head = (
        b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{" % path.encode()
    )
    with start as server, ThreadPoolExecutor(1) as pool:
        told = pool.submit(said_to, server, head)
        time.sleep(0.3)
        server.terminate()
        status, body = told.result()
        assert status == 503
        said = body["error"] if path in KSERVE else body["error"]["message"]
        assert "the server shut down before the answer was complete" in said
        assert server.exit_code(10) == 0
        assert "Traceback" not in server.stderr()


@pytest.mark.parametrize("package", ["aim_runtime", "aim_guardrail"])
def test_a_start_can_be_ended(package: str) -> None:
    """The first process of a container does not get a SIGTERM that it has no handler for, and its imports take a
    second: it would live until it is killed."""
    code = f"""
import os, signal, sys, time, types
def run(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
server = sys.modules["{package}.server"] = types.ModuleType("{package}.server")
server.run = run
from {package}.__main__ import main
main()
"""
    flags = ["--model_name", "m", *(["--predictor_host", "127.0.0.1:9"] if package == "aim_guardrail" else [])]
    ended = subprocess.run([sys.executable, "-c", code, *flags], timeout=30, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")


# --- a log that cannot be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["full", "closed"])
def test_no_request_fails_for_its_log(broken: str) -> None:
    if broken == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    with Served(Served.fake_arguments(), stdout=stdout) as server, httpx.Client(base_url=server.url) as client:
        os.close(stdout)
        lost = metric(server, "access_log_lost_lines_total")
        assert [client.post(OPENAI[0], json=ask("hi")).status_code for _ in range(3)] == [200] * 3
        with grpc.insecure_channel(server.grpc_url) as channel:
            question = pb.ModelInferRequest(model_name="m")
            question.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hi")
            assert pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(question, timeout=20).outputs
        assert metric(server, "access_log_lost_lines_total") == lost + 4
        server.terminate()
        assert server.exit_code() == 0
        assert "Traceback" not in server.stderr()
