"""``aim-runtime batch`` on a bad day: lines, files and servers that are not what they should be."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest

from aim_runtime.batch.answers import Answers
from aim_runtime.batch.command import main
from aim_runtime.batch.lines import BatchError, Input
from aim_runtime.batch.pace import Pace
from aim_runtime.batch.run import Batch, Stopped
from aim_runtime.engines.openai_server.connection import Connection
from raw_server import Behaviour, RawServer, http, says, then_closes, then_resets

GOOD = b'{"custom_id":"r-0","method":"POST","url":"/v1/completions","body":{"prompt":"x"}}\n'


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it to back off."""
    monkeypatch.setattr("aim_runtime.batch.run._BACKOFF_S", 0.01)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What the command sets for its process is set back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def lines(count: int) -> bytes:
    return b"".join(GOOD.replace(b"r-0", b"r-%d" % number) for number in range(count))


def opened(closing: ExitStack, folder: Path, text: bytes = GOOD) -> tuple[Input, Answers]:
    (folder / "in").write_bytes(text)
    source = Input(folder / "in")
    closing.callback(source.close)
    answers = Answers(folder / "out", source)
    closing.callback(answers.close)
    return source, answers


def found(folder: Path) -> dict[str, Any]:
    return {each["custom_id"]: each for each in map(orjson.loads, (folder / "out").read_bytes().splitlines())}


async def asked(
    url: str, source: Input, answers: Answers, *, most: int = 4, patience_s: float = 60, timeout_s: float = 60
) -> None:
    connection = Connection(url, most=most, silence_timeout_s=timeout_s)
    pace = Pace(most, most, time.monotonic, random.Random(1))
    try:
        await Batch(
            source.lines(answers.done), answers, connection, pace, most=most, patience_s=patience_s, report=lambda: None
        ).run()
    finally:
        await connection.close()


# IN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xef\xbb\xbf" + GOOD, "in:1: .*byte order mark.*: save it as UTF-8 without one"),
        (GOOD.decode().encode("utf-16"), "in:1: .*byte order mark"),
        (b"\0" + GOOD, "in:1: no batch line: JSON is malformed"),
        (GOOD.replace(b"r-0", b"r\\ud800"), "in:1: .*: give each line a text|in:1: no batch line"),
        (GOOD.replace(b'"x"', b"[" * 100_000 + b"]" * 100_000), "in:1: .*nested"),
        (b"[" * 100_000 + b"\n", "in:1: .*nested|in:1: no batch line"),
        (GOOD.replace(b"/v1/completions", b"/v1/" + b"x" * 100_000), "in:1: url: "),
        (GOOD.replace(b"/v1/completions", b"/v1/\\n\\u001b[2J"), "in:1: url: "),
        (GOOD.replace(b'"body"', b'"' + b"k" * 100_000 + b'":1,"body"'), "in:1: k+.*unknown field"),
        (GOOD.replace(b'"x"', b'"x","stream":false,"stream":true'), "in:1: body.stream: true"),
        (b"\n\n", "has no lines"),
        (b"\xff\xfe\xfd\n", "in:1: "),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_a_line_that_is_wrong_is_told_in_one_line(
    tmp_path: Path, text: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_bytes(text)
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--url", "http://127.0.0.1:1"]) == 2
    err = capsys.readouterr().err
    first, _, rest = err.partition("\n")
    assert first.startswith("error: ")
    assert first.isprintable()
    assert len(first) < 1000
    assert not rest
    with pytest.raises(BatchError, match=said):
        Input(tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_crlf_and_a_last_line_without_an_end_are_lines(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(lines(3).replace(b"\n", b"\r\n").rstrip())
    source = Input(tmp_path / "in")
    assert [line.custom_id for line in source.lines(bytearray(1))] == ["r-0", "r-1", "r-2"]
    source.close()


@pytest.mark.parametrize("kind", ["pipe", "directory", "unreadable"])
def test_an_input_that_cannot_be_read_twice_is_refused(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"pipe": tmp_path / "pipe", "directory": tmp_path, "unreadable": Path("/proc/self/mem")}[kind]
    if kind == "pipe":
        os.mkfifo(source)
        descriptor = os.open(source, os.O_RDWR)
        os.write(descriptor, GOOD)
    assert main([str(source), str(tmp_path / "out"), "--url", "http://127.0.0.1:1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {source}: ")
    assert err.endswith(": give a file of batch lines (JSON Lines)\n")


@pytest.mark.parametrize("change", ["longer", "shorter", "other", "gone lines"])
def test_an_input_that_changes_while_it_is_asked_ends_the_run(tmp_path: Path, closing: ExitStack, change: str) -> None:
    source, answers = opened(closing, tmp_path, lines(9))
    left = source.lines(answers.done)
    next(left)
    new = {"longer": lines(99), "shorter": lines(2), "other": lines(9).replace(b"{", b"["), "gone lines": b""}[change]
    (tmp_path / "in").write_bytes(new)
    os.utime(tmp_path / "in", (1, 1))
    with pytest.raises(BatchError, match="in: changed while its lines were asked: give it as it was"):
        list(left)


# OUT


def test_what_lies_beside_out_and_is_not_ours_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    (tmp_path / "out.batch").write_text("my notes\n")
    source = Input(tmp_path / "in")
    with pytest.raises(BatchError, match=r"out\.batch: is not this command's: move it away, or give another OUT"):
        Answers(tmp_path / "out", source)
    assert (tmp_path / "out.batch").read_text() == "my notes\n"
    source.close()
    (tmp_path / "x.batch").write_bytes(GOOD)
    source = Input(tmp_path / "x.batch")
    with pytest.raises(BatchError, match="is the input itself"):
        Answers(tmp_path / "x", source)
    assert (tmp_path / "x.batch").read_bytes() == GOOD
    source.close()


def test_an_out_that_was_removed_is_begun_anew_with_another_input(tmp_path: Path, closing: ExitStack) -> None:
    _, answers = opened(closing, tmp_path)
    answers.close()
    (tmp_path / "out").unlink()
    _, again = opened(closing, tmp_path, lines(2))
    assert again.count == 0


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_an_out_that_is_no_file_is_refused(tmp_path: Path, kind: str, closing: ExitStack) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    source = Input(tmp_path / "in")
    closing.callback(source.close)
    out = tmp_path / "out"
    {"pipe": lambda: os.mkfifo(out), "directory": out.mkdir, "device": lambda: out.symlink_to("/dev/null")}[kind]()
    with pytest.raises(BatchError, match=r"out: .*: give (another OUT|an OUT that can be written)"):
        Answers(out, source)


async def test_an_out_that_is_moved_away_while_it_is_written_ends_the_run(tmp_path: Path, closing: ExitStack) -> None:
    source, answers = opened(closing, tmp_path, lines(3))
    (tmp_path / "out").rename(tmp_path / "moved")
    async with RawServer(behave=says(http({"object": "x"}))) as server:
        with pytest.raises(OSError, match="was moved or removed"):
            await asked(server.url, source, answers)


def test_an_answer_edited_by_hand_is_read_or_named(tmp_path: Path, closing: ExitStack) -> None:
    source, answers = opened(closing, tmp_path, lines(3))
    for number in range(3):
        answers.add(f"r-{number}", 200, "x", b'{"object": 1}')
    answers.close()
    out = tmp_path / "out"
    whole = out.read_bytes().splitlines(keepends=True)

    def again(text: bytes) -> Answers:
        out.write_bytes(text)
        made = Answers(out, source)
        closing.callback(made.close)
        return made

    assert again(whole[2] + whole[0]).count == 2  # a line taken out is asked again
    deep = b'{"custom_id":"r-1","response":{"status_code":200,"body":' + b"[" * 100_000 + b"]" * 100_000 + b"}}\n"
    for text in (b"\n", b"\xef\xbb\xbf" + whole[1], b"x\n", b'{"custom_id": 7}\n', deep, b'{"custom_id":"other"}\n'):
        closing.pop_all().close()
        source = Input(tmp_path / "in")
        closing.callback(source.close)
        with pytest.raises(BatchError, match=r"out:2: .*: (take that line out|give another OUT)") as refused:
            again(whole[0] + text)
        assert len(str(refused.value)) < 1000
        assert out.read_bytes() == whole[0] + text


def test_a_full_disk_ends_it_with_one_line_and_room_lets_it_go_on(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(lines(40))

    async def both() -> tuple[int | None, bytes]:
        async with RawServer(behave=says(http({"object": "x" * 500}))) as server:
            command = ["-m", "aim_runtime", "batch", str(tmp_path / "in"), str(tmp_path / "out"), "--url", server.url]
            limit: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # noqa: E731
            full = await asyncio.create_subprocess_exec(
                sys.executable, *command, stderr=subprocess.PIPE, preexec_fn=limit
            )
            _, err = await full.communicate()
            again = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=subprocess.PIPE)
            await again.communicate()
            assert again.returncode == 0
            assert len(server.asked) <= 40 + 16
        return full.returncode, err

    code, err = asyncio.run(both())
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: File too large; ".encode())
    assert b"Traceback" not in err
    assert len(found(tmp_path)) == 40


# Servers


@pytest.mark.parametrize(
    ("behave", "code", "status"),
    [
        (says(http({"error": {"message": "boom"}})), "error_in_answer", 200),
        (says(http(b"<html>Log in</html>", kind="text/html")), "no_answer", None),
        (says(http(b"")), "no_answer", None),
        (says(http(b"[1]")), "no_answer", None),
        (says(http(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")), "no_answer", None),
        (says(http({}, 302, location="http://elsewhere/")), None, 302),
        (then_closes(b"SSH-2.0-OpenSSH_9.6\r\n"), "connection_error", None),
        (then_closes(http({"object": 1})[:-3]), "connection_error", None),
        (then_resets(), "connection_error", None),
    ],
)
async def test_what_is_no_answer_is_an_error_after_five_tries(
    tmp_path: Path, closing: ExitStack, behave: Behaviour, code: str | None, status: int | None
) -> None:
    source, answers = opened(closing, tmp_path)
    async with RawServer(behave=behave) as server:
        await asked(server.url, source, answers, patience_s=0.001)  # it is not out of reach
        assert len(server.asked) == (1 if status else 5)
    line = found(tmp_path)["r-0"]
    assert (line["error"] and line["error"]["code"]) == code
    assert (line["response"] and line["response"]["status_code"]) == status
    assert answers.failed == 1
    answers.close()
    again = Answers(tmp_path / "out", source)
    assert (again.count, again.failed) == (1, 1)
    again.close()


async def test_an_error_in_an_answer_as_openai_and_responses_write_it(tmp_path: Path, closing: ExitStack) -> None:
    """/v1/responses has ``"error": null`` in every answer."""
    source, answers = opened(closing, tmp_path)
    async with RawServer(behave=says(http({"object": "response", "error": None}))) as server:
        await asked(server.url, source, answers)
    assert found(tmp_path)["r-0"]["error"] is None
    assert answers.failed == 0


async def test_a_line_that_hangs_is_passed_and_the_others_are_answered(tmp_path: Path, closing: ExitStack) -> None:
    source, answers = opened(closing, tmp_path, lines(3))

    async def behave(writer: asyncio.StreamWriter) -> None:
        if server.asked[-1].body["prompt"] == "hangs":
            await asyncio.sleep(60)
        writer.write(http({"object": "x"}))

    (tmp_path / "in").write_bytes(lines(3).replace(b'"x"', b'"hangs"', 1))
    source = Input(tmp_path / "in")
    answers.close()
    (tmp_path / "out").unlink()
    answers = Answers(tmp_path / "out", source)
    async with RawServer(behave=behave) as server:
        await asked(server.url, source, answers, most=1, patience_s=0.05, timeout_s=0.1)
    assert found(tmp_path)["r-0"]["error"]["code"] == "connection_error"
    assert answers.count - answers.failed == 2
    answers.close()
    source.close()


async def test_a_storm_of_refusals_without_a_time_is_asked_ever_less(tmp_path: Path, closing: ExitStack) -> None:
    source, answers = opened(closing, tmp_path, lines(30))
    async with RawServer(behave=says(http({}, 429))) as server:
        task = asyncio.ensure_future(asked(server.url, source, answers, most=30))
        await asyncio.sleep(2.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert 30 <= len(server.asked) < 2 * 30
    assert answers.count == 0


async def test_who_is_out_of_reach_is_waited_for_since_it_is_not_since_the_last_answer(
    tmp_path: Path, closing: ExitStack
) -> None:
    source, answers = opened(closing, tmp_path)
    now_s = iter([0.0, *[3600.0] * 8, *[3600.0 + number for number in range(1000)]])  # a request that took an hour
    connection, told = Connection("http://127.0.0.1:9", most=1), list[float]()

    def clock() -> float:
        told.append(next(now_s))
        return told[-1]

    pace = Pace(1, 1, lambda: told[-1], random.Random(1))
    batch = Batch(
        source.lines(answers.done), answers, connection, pace, most=1, patience_s=9, report=lambda: None, clock=clock
    )
    with pytest.raises(Stopped, match=r"cannot be reached, for 9 s"):
        await batch.run()
    await connection.close()
    assert told[-1] > 3600 + 9


# Arguments


@pytest.mark.parametrize(
    "url",
    [
        "http://h:0",
        "http://[",
        "http://h:99999",
        "http://user:s3cret@h",
        "http://h/\n",
        "http://h?x=1",
        "http://h/#f",
        "ftp://h",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "in"), str(tmp_path / "out"), "--url", url])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert "--url" in err
    assert "give http://HOST:PORT" in err or "--api-key-file" in err
    assert "s3cret" not in err
