"""``aim-runtime batch`` against a real server: every line answered exactly once, whatever is killed meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_runtime.batch.answers import Answers
from aim_runtime.batch.command import main
from aim_runtime.batch.lines import BatchError, Input
from aim_runtime.batch.pace import Pace
from aim_runtime.batch.run import Batch
from aim_runtime.engines.openai_server.connection import Connection
from fake_engine import words
from ports import free_ports
from raw_server import RawServer, http, says, then_resets
from served import Served

KILLS = int(os.environ.get("SOAK_KILLS", "3"))


def line(number: int, **body: Any) -> dict[str, Any]:
    asked = {"model": "m", "prompt": f"say {number}", "max_tokens": 1 + number % 7, **body}
    return {"custom_id": f"r-{number}", "method": "POST", "url": "/v1/completions", "body": asked}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in lines))
    return path


def start(source: Path, out: Path, url: str, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "aim_runtime", "batch", str(source), str(out), "--url", url, *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def run(source: Path, out: Path, url: str, *flags: str) -> tuple[int, str]:
    process = start(source, out, url, *flags)
    _, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    return process.returncode, err.decode()


def answers(out: Path) -> dict[str, dict[str, Any]]:
    found = [orjson.loads(each) for each in out.read_bytes().splitlines()]
    by_id = {each["custom_id"]: each for each in found}
    assert len(by_id) == len(found)
    return by_id


def assert_all_right(out: Path, count: int) -> None:
    found = answers(out)
    assert found.keys() == {f"r-{number}" for number in range(count)}
    for number in range(count):
        answer = found[f"r-{number}"]
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["choices"][0]["text"] == "".join(words(1 + number % 7))


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with Served.fake(token_s=0.005) as served:
        yield served


def posts(server: Served) -> int:
    return sum(each["method"] == "POST" for each in server.access_lines())


def test_answers_and_errors_are_openais(tmp_path: Path, server: Served):
    lines = [line(0), line(1, max_tokens=-1), {**line(2), "url": "/v1/chat/completions"}]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    before = posts(server)
    code, err = run(source, out, server.url + "/v1")
    assert (code, "3 of 3 lines answered, 2 of them with an error" in err) == (1, True)
    found = answers(out)
    assert found["r-0"].keys() == {"id", "custom_id", "response", "error"}
    assert found["r-0"]["response"]["body"]["choices"][0]["text"] == "the"
    assert found["r-1"]["response"]["status_code"] == 400
    assert "max_tokens" in found["r-1"]["response"]["body"]["error"]["message"]
    asked = [each["request_id"] for each in server.access_lines() if each["method"] == "POST"]
    assert {each["response"]["request_id"] for each in found.values()} == set(asked[before:])
    assert run(source, out, server.url)[0] == 1  # all are answered: nothing is asked again
    assert posts(server) - before == 3


async def run_on(server: RawServer, source: Path, out: Path, *flags: str) -> tuple[int | None, str]:
    """As :func:`run`, while the server is served by this loop."""
    return await run_at(server.url, source, out, *flags)


async def run_at(url: str, source: Path, out: Path, *flags: str) -> tuple[int | None, str]:
    command = ["-m", "aim_runtime", "batch", str(source), str(out), "--url", url, *flags]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=subprocess.PIPE)
    _, err = await process.communicate()
    assert b"Traceback" not in err
    return process.returncode, err.decode()


async def test_a_body_goes_out_as_it_was_written_with_the_key_in_the_lowest_class(tmp_path: Path):
    body = b'{ "n": 1.50,  "text": "\\u00e9", "service_tier": "flex" }'
    source, out, key = tmp_path / "in", tmp_path / "out", tmp_path / "key"
    source.write_bytes(b'\n{"custom_id":"r-0","method":"POST","url":"/v1/responses","body":' + body + b"}\n\n")
    key.write_text("aim-secret\n")
    async with RawServer(behave=says(http(b'{"x": 12345678901234567890123, "y": 1.50}'))) as server:
        assert await run_on(server, source, out, "--api-key-file", str(key)) == (0, "done: 1 of 1 lines answered\n")
    (asked,) = server.asked
    assert asked.path == "/v1/responses"
    assert asked.headers["x-qos-priority"] == "low"
    assert asked.headers["authorization"] == "Bearer aim-secret"
    assert int(asked.headers["content-length"]) == len(body)
    assert b'"body":{"x": 12345678901234567890123, "y": 1.50}' in out.read_bytes()


async def test_a_refusal_is_asked_again_however_often(tmp_path: Path):
    source, out = write(tmp_path / "in", [line(0)]), tmp_path / "out"
    refusals = iter([http({}, status, retry_after="0") for status in (429, 503)] * 6)

    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(next(refusals, http({"done": True})))

    async with RawServer(behave=behave) as server:
        assert (await run_on(server, source, out))[0] == 0
        assert len(server.asked) == 13
    assert answers(out)["r-0"]["response"]["body"] == {"done": True}


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (http({"error": {"code": "too_large"}}, 429), 429),
        (http({"error": {"message": "no"}}, 403), 403),
        (http(b"plain\nwords", 404, "text/plain"), 404),
    ],
)
async def test_what_no_wait_helps_is_the_answer(tmp_path: Path, answer: bytes, status: int):
    source, out = write(tmp_path / "in", [line(0)]), tmp_path / "out"
    async with RawServer(behave=says(answer)) as server:
        assert (await run_on(server, source, out))[0] == 1
        assert len(server.asked) == 1
    response = answers(out)["r-0"]["response"]
    assert response["status_code"] == status
    body = answer.partition(b"\r\n\r\n")[2]
    assert response["body"] == (body.decode() if status == 404 else orjson.loads(body))


async def test_a_request_that_breaks_the_connection_is_given_up_on_after_five_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closing: ExitStack
):
    """In this process, so that nobody waits for it to back off."""
    monkeypatch.setattr("aim_runtime.batch.run._BACKOFF_S", 0.01)
    source = Input(write(tmp_path / "in", [line(0)]))
    found = Answers(tmp_path / "out", source)
    closing.callback(source.close)
    closing.callback(found.close)
    async with RawServer(behave=then_resets(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")) as server:
        connection = Connection(server.url, most=4)
        pace = Pace(4, 4, time.monotonic, random.Random(1))
        lines = source.lines(found.done)
        await Batch(lines, found, connection, pace, most=4, patience_s=60, report=lambda: None).run()
        await connection.close()
        assert len(server.asked) == 5
    error = answers(tmp_path / "out")["r-0"]["error"]
    assert (error["code"], "closed the connection" in error["message"]) == ("connection_error", True)


async def test_a_key_that_is_refused_ends_the_run_with_nothing_answered(tmp_path: Path):
    source, out = write(tmp_path / "in", [line(number) for number in range(9)]), tmp_path / "out"
    async with RawServer(behave=says(http({"error": {"message": "who?"}}, 401))) as server:
        code, err = await run_on(server, source, out)
    assert (code, out.read_bytes()) == (1, b"")
    assert "the server refuses the key (401): give --api-key-file a valid one" in err
    assert "0 of 9 lines answered: run the same command again to go on" in err


async def test_a_terminated_run_says_where_it_is(tmp_path: Path):
    source, out = write(tmp_path / "in", [line(0)]), tmp_path / "out"

    async def behave(writer: asyncio.StreamWriter) -> None:
        process.terminate()
        await asyncio.sleep(60)

    async with RawServer(behave=behave) as server:
        command = ["-m", "aim_runtime", "batch", str(source), str(out), "--url", server.url]
        process = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=subprocess.PIPE)
        _, err = await process.communicate()
    assert process.returncode == 1
    assert err == b"error: stopped; 0 of 1 lines answered: run the same command again to go on\n"


def test_killed_at_any_point_no_line_is_lost_or_done_twice(tmp_path: Path, server: Served):
    seed, count = random.randrange(2**32), max(200, 60 * KILLS)
    print(f"seed {seed}")  # shown when it fails
    rng = random.Random(seed)
    source, out = write(tmp_path / "in.jsonl", [line(number) for number in range(count)]), tmp_path / "out.jsonl"
    kills, before = 0, posts(server)
    while kills < KILLS:
        process = start(source, out, server.url, "--concurrency", "4")
        here = out.stat().st_size if out.exists() else 0
        target = here + rng.randrange(0, 6000)
        while process.poll() is None and (out.stat().st_size if out.exists() else 0) <= target:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        if rng.random() < 0.5:  # the machine went down in the middle of a line
            out.write_bytes(out.read_bytes()[: -rng.randrange(1, 100)])
    assert kills >= min(KILLS, 2)
    assert run(source, out, server.url)[0] == 0
    assert_all_right(out, count)
    assert posts(server) - before <= count + kills * (4 + 1)


def test_a_full_server_is_asked_until_it_has_room(tmp_path: Path):
    source, out = write(tmp_path / "in.jsonl", [line(number) for number in range(12)]), tmp_path / "out.jsonl"
    with Served.fake(token_s=0.02, slots=1, max_waiting=1) as server:
        code, err = run(source, out, server.url, "--concurrency", "8")
        refused = sum(each["status"] == 503 for each in server.access_lines())
    assert code == 0, err
    assert 0 < refused < 12
    assert_all_right(out, 12)


async def test_a_server_that_is_away_for_a_while_is_waited_for(tmp_path: Path):
    """Before it is there, and after it died in the middle."""
    source, out = write(tmp_path / "in.jsonl", [line(number) for number in range(60)]), tmp_path / "out.jsonl"
    (port,) = free_ports(1)
    running = asyncio.ensure_future(run_at(f"http://127.0.0.1:{port}", source, out, "--concurrency", "2"))
    while not out.exists():  # noqa: ASYNC110  another process makes it
        await asyncio.sleep(0.01)
    answering = says(http({"object": "x"}))

    async def answers_twenty(writer: asyncio.StreamWriter) -> None:
        await (answering(writer) if len(first.asked) <= 20 else asyncio.Event().wait())

    async with RawServer(behave=answers_twenty, port=port) as first:
        while len(first.asked) <= 20:  # noqa: ASYNC110  it tells nobody
            await asyncio.sleep(0.001)
    async with RawServer(behave=answering, port=port) as second:
        code, err = await running
        assert 0 < len(second.asked) < 60
    assert code == 0, err
    found = answers(out)
    assert found.keys() == {f"r-{number}" for number in range(60)}
    assert all(each["response"]["status_code"] == 200 for each in found.values())


def test_nobody_there_ends_after_patience_and_loses_nothing(tmp_path: Path, server: Served):
    source, out = write(tmp_path / "in.jsonl", [line(0)]), tmp_path / "out.jsonl"
    code, err = run(source, out, f"http://127.0.0.1:{free_ports(1)[0]}", "--patience-seconds", "0.2")
    assert code == 1
    assert "cannot be reached, for 0.2 s; 0 of 1 lines answered: run the same command again to go on" in err
    assert run(source, out, server.url)[0] == 0


def test_an_input_that_is_wrong_is_refused_before_anything_is_asked(tmp_path: Path):
    wrong = [
        ({**line(0), "method": "GET"}, "1: method: .*'GET': give POST"),
        ({**line(1), "url": "/v1/files"}, "2: url: .*'/v1/files': give one of /v1/chat"),
        ({**line(2), "more": 1}, "3: more: .*unknown field"),
        (line(3, stream=True), "4: body.stream: true.*leave it out"),
        ({**line(4), "body": "x"}, "5: body: Expected `object`"),
        ({key: value for key, value in line(5).items() if key != "custom_id"}, "6: custom_id: .*missing"),
        (line(7), None),
        (line(7), r"8: custom_id: 'r-7' is that of line 7"),
    ]
    source = write(tmp_path / "in", [each for each, _ in wrong])
    with pytest.raises(BatchError) as refused:
        Input(source)
    for _, said in wrong:
        if said:
            assert refused.match(rf"(?m)^{source}:{said}")
    code, err = run(source, tmp_path / "out", "http://127.0.0.1:1")
    assert (code, err.count("error: ")) == (2, 7)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--url", "localhost:8080"), "is no address: give http://HOST:PORT"),
        (("--concurrency", "0"), "give auto, or a number"),
        (("--timeout-seconds", "-1"), "a number of seconds above 0"),
        (("--api-key-file", "/nowhere"), "--api-key-file /nowhere: cannot be read (No such file"),
        (("--speed", "1"), "unrecognized arguments"),
    ],
)
@pytest.mark.usefixtures("signals")
def test_wrong_arguments(tmp_path: Path, flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]):
    source = write(tmp_path / "in", [line(0)])
    try:
        code = main([str(source), str(tmp_path / "out"), "--url", "http://127.0.0.1:1", *flags])
    except SystemExit as ended:  # argparse
        code = ended.code
    err = capsys.readouterr().err
    assert (code, said in err) == (2, True), err


@pytest.fixture
def signals() -> Iterator[None]:
    """What the command sets for its process is set back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_out_of_something_else_is_refused(tmp_path: Path, closing: ExitStack):
    source = Input(write(tmp_path / "in", [line(0), line(1)]))
    other = Input(write(tmp_path / "other", [line(0)]))
    closing.callback(source.close)
    closing.callback(other.close)
    out = tmp_path / "out"
    first = Answers(out, source)
    with pytest.raises(BatchError, match="another process writes"):
        Answers(out, source)
    first.add("r-0", 200, "x", b"{}")
    first.close()
    with pytest.raises(BatchError, match="has answers to another input"):
        Answers(out, other)
    out.write_bytes(out.read_bytes() * 2)
    with pytest.raises(BatchError, match="out:2: custom_id 'r-0' was answered before"):
        Answers(out, source)
    with pytest.raises(BatchError, match="is the input itself"):
        Answers(source.path, source)
    (tmp_path / "mine").write_text("my notes\n")
    with pytest.raises(BatchError, match="was not begun by this command"):
        Answers(tmp_path / "mine", source)
    assert (tmp_path / "mine").read_text() == "my notes\n"


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 400), st.booleans())
def test_cut_anywhere_whole_lines_stay_and_the_rest_is_asked_again(tmp_path_factory: Any, cut: int, failed: bool):
    folder = tmp_path_factory.mktemp("cut")
    source, out = Input(write(folder / "in", [line(number) for number in range(3)])), folder / "out"
    whole = Answers(out, source)
    whole.add("r-2", 429 if failed else 200, "x", b'{"a":\n 1}')
    whole.add_failure("r-0", "connection_error", "gone")
    whole.close()
    text = out.read_bytes()
    out.write_bytes(text[:cut])
    again = Answers(out, source)
    kept = text[:cut].count(b"\n")
    assert (again.count, again.failed) == (kept, (kept > 0 and failed) + (kept > 1))
    assert out.read_bytes() == b"".join(text.splitlines(keepends=True)[:kept])
    left = [each.custom_id for each in source.lines(again.done)]
    assert left == [["r-0", "r-1", "r-2"], ["r-0", "r-1"], ["r-1"]][kept]
    again.close()
    source.close()


def test_memory_does_not_follow_the_file(tmp_path: Path):
    source, count = tmp_path / "in", 40_000
    with source.open("wb") as file:
        for number in range(count):
            file.write(orjson.dumps(line(number)) + b"\n")
    tracemalloc.start()
    found = Input(source)
    assert found.at("r-39999") == 39_999
    found.forget_ids()
    assert sum(1 for _ in found.lines(bytearray(count // 8 + 1))) == count
    found.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < source.stat().st_size / 2


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_pace_grows_by_one_a_round_and_halves_once_per_refused_round():
    clock = Clock()
    pace = Pace(16, 4, clock, random.Random(1))
    for _ in range(4):
        pace.answered()
    assert pace.at_once == pytest.approx(5, abs=0.1)
    for _ in range(8):  # all of one round
        pace.refused(0.0, 2.0)
        clock.now = 1.0
    assert pace.at_once == pytest.approx(2.5, abs=0.1)
    assert 2.0 <= pace.pause_s() + 1.0 <= 1.0 + 2.5
    assert not pace.room(0)
    clock.now += 3.0
    assert pace.room(1)
    assert not pace.room(2)


def test_without_a_time_to_come_back_the_pause_doubles_until_an_answer():
    clock = Clock()
    pace = Pace(16, 8, clock, random.Random(1))
    pauses = []
    for _ in range(9):
        pace.refused(clock.now, None)
        pauses.append(pace.pause_s())
        clock.now += pauses[-1]
    for pause_s, least_s in zip(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60], strict=True):
        assert least_s <= pause_s <= 1.25 * least_s
    assert pace.at_once == 1
    pace.answered()
    pace.refused(clock.now, None)
    assert pace.pause_s() <= 1.25


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.none() | st.floats(0, 100)), max_size=200), st.integers(1, 64))
def test_there_is_always_room_for_one_after_the_pause(events: list[tuple[bool, float | None]], most: int):
    clock = Clock()
    pace = Pace(most, 4, clock, random.Random(0))
    for answered, retry_after_s in events:
        clock.now += pace.pause_s()
        assert pace.room(0)
        assert not pace.room(most)
        if answered:
            pace.answered()
        else:
            pace.refused(clock.now, retry_after_s)
