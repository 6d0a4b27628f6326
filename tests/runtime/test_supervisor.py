"""An engine in a process of its own: all of the Engine protocol goes through, and whatever the process does, whoever
waits is told and it is started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_kserve import errors
from aim_kserve.errors import BadRequest, NotFound, ServingError, Unavailable
from aim_runtime.engines.base import Engine, EngineDied, EngineSpec, Json, ModelLoadError, RequestContext, Stream, Usage
from aim_runtime.fields import fields_of
from aim_runtime.supervisor import launch as launching
from aim_runtime.supervisor import link
from aim_runtime.supervisor import supervisor as supervising
from aim_runtime.supervisor.frames import NOTHING, WINDOW_BYTES, Abort, Ask, Chunks, Ended, FromEngine, Reader, encode
from aim_runtime.supervisor.launch import Launch, Process
from aim_runtime.supervisor.remote import RemoteEngine
from aim_runtime.supervisor.service import Service
from aim_runtime.supervisor.words import Words
from fake_engine import FakeChatBody, FakeEngine, words

ASK = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 20}


@pytest.fixture(autouse=True)
def _odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "CHILD", "odd_child")


def engine_of(options: Json | None = None, *, stall_timeout_s: float = 30, start_timeout_s: float = 60, **more: Any):
    spec = EngineSpec("odd", Path("/nowhere"), "m", max_concurrency=8, options=options or {})
    return RemoteEngine(Launch(spec, **more), start_timeout_s=start_timeout_s, stall_timeout_s=stall_timeout_s)


@asynccontextmanager
async def loaded(options: Json | None = None, **more: Any) -> AsyncIterator[RemoteEngine]:
    engine = engine_of(options, **more)
    try:
        await engine.load()
        yield engine
    finally:
        await engine.close()


async def ask(engine: RemoteEngine, operation: str, body: Json, context: RequestContext | None = None) -> Json:
    answer = await engine.operations[operation](body, context or RequestContext("r"))
    assert isinstance(answer, dict)
    return answer


async def stream(engine: RemoteEngine, operation: str, body: Json, context: RequestContext | None = None) -> Stream:
    answer = await engine.operations[operation](body, context or RequestContext("r"))
    assert not isinstance(answer, dict)
    return answer


async def pid(engine: RemoteEngine) -> int:
    number = (await ask(engine, "odd/pid", {}))["pid"]
    assert isinstance(number, int)
    return number


async def until(condition: Callable[[], Any], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


# --- frames -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.binary(max_size=300), max_size=4), max_size=5), st.lists(st.integers(1, 400), max_size=20))
def test_messages_arrive_whole_however_the_bytes_are_cut(frames: list[list[bytes]], cuts: list[int]) -> None:
    sent = [[Chunks(number, chunks, NOTHING)] for number, chunks in enumerate(frames)]
    data = b"".join(bytes(encode(messages)) for messages in sent)
    reader, read, at = Reader(FromEngine), [], 0
    for cut in (*cuts, len(data)):
        read += reader.feed(data[at : at + cut])
        at += cut
    assert read == [message for messages in sent for message in messages]


def test_a_large_frame_in_many_pieces_is_copied_once() -> None:
    data = bytes(encode([Chunks(1, [bytes(2**24)], NOTHING)]))
    reader = Reader(FromEngine)
    pieces = [data[at : at + 2**16] for at in range(0, len(data), 2**16)]
    buffers = set()
    for piece in pieces[:-1]:
        assert reader.feed(piece) == []
        buffers.add(id(reader._rest))
    assert len(buffers) == 1  # it grew in place
    (message,) = reader.feed(pieces[-1])
    assert len(message.chunks[0]) == 2**24
    assert reader.feed(bytes(encode([Ended(2)]))) == [Ended(2)]


# --- the protocol goes through ----------------------------------------------------------------------------------------


async def test_it_is_what_the_engine_in_the_process_is() -> None:
    async with loaded() as engine:
        assert (engine.name, engine.version, engine.max_model_len, engine.adapters) == ("fake", "1.2.3", 1000, ())
        assert {"chat/completions", "completions", "tokenize", "odd/pid"} <= set(engine.operations)
        assert engine.requests["chat/completions"] == fields_of(FakeChatBody)
        assert engine.healthy()
        assert (engine.state, engine.restarts) == ("ready", 0)
        assert engine.load_seconds is not None
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.state, stats.restarts) == (0, 0, "ready", 0)
        await until(lambda: engine.stats().slots_total == 8)


async def test_answers_streams_usage_and_the_context_go_through() -> None:
    async with loaded() as engine:
        context = RequestContext("r1", {"x-a": "b"})
        answer = await ask(engine, "chat/completions", ASK, context)
        assert answer["choices"][0]["message"]["content"] == "".join(words(20))
        assert (context.usage.prompt_tokens, context.usage.completion_tokens) == (3, 20)
        context = RequestContext("r2")
        chunks = [chunk async for chunk in await stream(engine, "chat/completions", {**ASK, "stream": True}, context)]
        assert len(chunks) == 22  # the role, 20 tokens, the reason
        assert (context.usage.prompt_tokens, context.usage.completion_tokens) == (3, 20)
        echoed = await ask(
            engine, "fake/echo", {"a": [1, 2.5, None, "ü", {"b": True}]}, RequestContext("r3", {"x": "y"})
        )
        assert echoed == {"body": {"a": [1, 2.5, None, "ü", {"b": True}]}, "request_id": "r3", "headers": {"x": "y"}}
        given = {"x": "y", "Authorization": "Bearer k", "x-api-key": "k", "api-key": "k", "cookie": "k"}
        echoed = await ask(engine, "fake/echo", {}, RequestContext("r3", {**given, "proxy-authorization": "k"}))
        assert echoed["headers"] == {"x": "y"}  # who asks is the server's to know
        context = RequestContext("r4", priority=7, timeout_s=1.5)
        assert await ask(engine, "odd/usage", {}, context) == {"priority": 7, "timeout_s": 1.5}
        assert (context.usage, context.ignored) == (Usage(3, 2, 1, 0.5, 0.25), ["bogus"])
        assert engine.pid == await pid(engine)


TREE = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ServingError) and kind.__init__ is ServingError.__init__
]


async def test_every_error_arrives_as_it_was_raised() -> None:
    async with loaded() as engine:
        assert len(TREE) >= 9
        for kind in TREE:
            for retry_after_s in (None, 7.5):
                with pytest.raises(ServingError) as caught:
                    await ask(engine, "odd/fail", {"kind": kind.__name__, "retry_after_s": retry_after_s})
                told = caught.value
                sent = kind("said so", param="p", code="c", retry_after_s=retry_after_s)
                assert type(told) is kind
                assert (told.status, told.body(), told.headers()) == (sent.status, sent.body(), sent.headers())
        with pytest.raises(BadRequest) as caught:
            await ask(engine, "odd/fail", {"kind": "Teapot"})
        assert (caught.value.status, caught.value.type, caught.value.headers()) == (
            418,
            "teapot_error",
            {"x-tea": "green"},
        )


async def test_what_breaks_in_the_process_is_an_internal_error_and_its_trace_is_in_our_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "aim.engine")
    async with loaded() as engine:
        answer = await stream(engine, "chat/completions", {**ASK, "stream": True, "fake": {"fail_after": 2}})
        with pytest.raises(ServingError, match="internal error") as caught:
            _ = [chunk async for chunk in answer]
        assert caught.value.status == 500
        await until(lambda: "model m: ZeroDivisionError: unforeseen" in caplog.text)
        with pytest.raises(ServingError, match="cannot be passed on"):
            await ask(engine, "odd/unsendable", {})
        assert (await ask(engine, "chat/completions", ASK))["choices"]


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\ud800"])
async def test_a_body_that_cannot_be_sent_is_a_bad_request(value: Any) -> None:
    async with loaded() as engine:
        with pytest.raises(BadRequest, match="cannot be passed on"):
            await ask(engine, "fake/echo", {"a": value})
        assert engine.stats().waiting == 0


async def test_who_leaves_is_aborted() -> None:
    async with loaded({"token_s": 0.01}) as engine:
        whole = asyncio.create_task(
            ask(engine, "chat/completions", {**ASK, "max_tokens": 999}, RequestContext("whole"))
        )
        answer = await stream(
            engine, "chat/completions", {**ASK, "max_tokens": 999, "stream": True}, RequestContext("s")
        )
        await answer.__anext__()
        await until(lambda: engine.stats().running == 2)
        unread = await stream(engine, "chat/completions", {**ASK, "stream": True}, RequestContext("unread"))
        whole.cancel()
        await answer.aclose()
        await unread.aclose()
        with pytest.raises(StopAsyncIteration):
            await answer.__anext__()
        aborted: list[str] = []
        while {"whole", "s"} - set(aborted):
            aborted = (await ask(engine, "fake/state", {}))["aborted"]
        assert engine.stats().running + engine.stats().waiting == 0


async def test_whoever_has_left_has_nothing_left_in_the_engine() -> None:
    """However it leaves: by the time that it is gone, the engine has let go of its request."""
    async with loaded() as engine:
        body = {"linger_s": 0.2}
        whole = asyncio.create_task(ask(engine, "odd/linger", body, RequestContext("whole")))
        opened = await stream(engine, "odd/linger", {**body, "stream": True}, RequestContext("opened"))
        read = await stream(engine, "odd/linger", {**body, "stream": True}, RequestContext("read"))
        reading = asyncio.create_task(read.__anext__())
        await reading
        whole.cancel()
        gone = await asyncio.gather(whole, opened.aclose(), read.aclose(), return_exceptions=True)
        assert [type(each) for each in gone] == [asyncio.CancelledError, type(None), type(None)]
        assert set((await ask(engine, "fake/state", {}))["aborted"]) == {"whole", "opened", "read"}


async def test_whoever_leaves_an_engine_that_does_not_answer_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "DROP_S", 0.05)
    async with loaded() as engine:
        opened = await stream(engine, "odd/linger", {"linger_s": 30, "stream": True})
        await opened.aclose()
        assert (await ask(engine, "fake/state", {}))["aborted"] == []
        opened = await stream(engine, "odd/linger", {"linger_s": 30, "stream": True})
        monkeypatch.setattr(link, "DROP_S", 60)
        leaving = asyncio.create_task(opened.aclose())
        with pytest.raises(Unavailable):
            await ask(engine, "odd/kill", {})
        await leaving  # it is gone with its process
        await until(lambda: engine.state == "ready")


async def test_a_slow_reader_waits_alone_and_loses_nothing() -> None:
    async with loaded() as engine:
        size, count = WINDOW_BYTES // 8, 100
        async with aclosing(await stream(engine, "odd/large", {"size": size, "count": count})) as slow:
            first = await slow.__anext__()
            await asyncio.sleep(0.2)
            sent = len((await ask(engine, "fake/state", {}))["seen"])
            assert sent <= 12  # a window, what its reader took, and one
            assert len([c async for c in await stream(engine, "odd/large", {"size": size, "count": 50})]) == 50
            rest = [chunk async for chunk in slow]
        assert [int(chunk[:8]) for chunk in (first, *rest)] == list(range(count))


async def test_nothing_is_lost_or_doubled_and_memory_is_flat() -> None:
    async with loaded() as engine:
        child, own = psutil.Process(await pid(engine)), psutil.Process()

        async def one(number: int) -> None:
            body = {**ASK, "max_tokens": 8 + number % 9, "stream": True}
            chunks = [chunk async for chunk in await stream(engine, "completions", {**body, "prompt": "x"})]
            assert len(chunks) == 8 + number % 9 + 1
            tokens = b"".join(chunks).count(b'"text":"') - 1
            assert tokens == 8 + number % 9

        async def many(count: int) -> tuple[int, int]:
            for first in range(0, count, 50):
                await asyncio.gather(*(one(number) for number in range(first, first + 50)))
            return own.memory_info().rss, child.memory_info().rss

        before = await many(600)
        after = await many(2000)
        for was, became in zip(before, after, strict=True):
            assert became < was + 4 * 2**20
        assert not engine._supervisor.link().calls


# --- how it is launched -----------------------------------------------------------------------------------------------


async def test_a_launch_sets_the_environment_the_cpus_and_the_memory() -> None:
    cpu = min(os.sched_getaffinity(0))
    env = {"ROCR_VISIBLE_DEVICES": "3"}
    async with loaded(env=env, cpus=frozenset({cpu}), memory_bytes=600 * 2**20) as engine:
        told = await ask(engine, "odd/pid", {})
        assert told["cpus"] == [cpu]
        assert os.getsid(told["pid"]) == told["pid"]
        assert not {"kserve", "fastapi", "uvicorn", "starlette"} & set(told["modules"])
        assert await ask(engine, "odd/environment", {"names": [*env, "PYTHONSAFEPATH"]}) == {
            **env,
            "PYTHONSAFEPATH": "1",
        }
        with pytest.raises(ServingError):  # MemoryError
            await ask(engine, "odd/blocks", {"bytes": 2**30})
        assert await ask(engine, "odd/blocks", {"bytes": 2**20}) == {"bytes": 2**20}


async def test_a_body_for_which_there_is_no_memory_costs_its_own_request_only() -> None:
    async with loaded(memory_bytes=300 * 2**20) as engine:
        pid = engine.pid
        for _ in range(2):
            with pytest.raises(Unavailable, match="has not enough memory left for this request"):
                await ask(engine, "odd/usage", {"values": [[]] * 4_000_000})
        with pytest.raises(Unavailable, match="has not enough memory left") as caught:
            await ask(engine, "odd/blocks", {"bytes": 2**30})
        assert (caught.value.code, caught.value.status) == ("memory_full", 503)
        assert await ask(engine, "odd/blocks", {"bytes": 2**20}) == {"bytes": 2**20}
        assert (engine.pid, engine.restarts) == (pid, 0)


def test_a_process_is_reaped_twice_and_closes_nobody_elses_file(tmp_path: Path) -> None:
    process = Process(Launch(EngineSpec("none", tmp_path, "m"), python="/bin/false"))
    before = process.exit_fd
    told = process.reap()
    null = os.open(os.devnull, os.O_RDONLY)
    if null != before:
        os.dup2(null, before)
        os.close(null)
    assert process.reap() == told
    os.fstat(before)  # the number was somebody else's by then
    os.close(before)
    process.discard()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"load_error": "x.gguf: bad magic"}, "x.gguf: bad magic"),
        ({"load_exit": 3}, "the engine's process ended with exit 3: .*cannot go on: the moon is full"),
        ({"bogus": 1}, "bogus: not a setting of the odd engine"),
    ],
)
async def test_a_first_start_that_fails_says_why(options: Json, says: str) -> None:
    engine = engine_of(options)
    with pytest.raises(ModelLoadError, match=says):
        await engine.load()
    assert engine.state == "failed"
    assert not engine.healthy()
    await engine.close()


async def test_a_start_takes_no_longer_than_it_may() -> None:
    engine = engine_of({"load_s": 600}, start_timeout_s=2)
    with pytest.raises(ModelLoadError, match=r"not loaded it in 2 s \(--start_timeout\)"):
        await engine.load()
    await engine.close()


async def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelLoadError, match="/nowhere/python"):
        await engine_of(python="/nowhere/python").load()


async def test_closed_while_loading_or_before_it_leaves_nothing() -> None:
    engine = engine_of({"load_s": 600})
    engine.spawn()
    process = psutil.Process().children()[-1]
    await engine.close()
    assert not process.is_running()
    engine = engine_of({"load_s": 600})
    loading = asyncio.create_task(engine.load())
    await asyncio.sleep(0.5)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    await engine.close()
    assert engine._supervisor._child is None
    assert not any("odd_child" in " ".join(child.cmdline()) for child in psutil.Process().children())


# --- faults -----------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Json, str]] = {
    "kill": ({}, "was killed by SIGKILL"),
    "exit": ({"code": 3}, "its process ended with exit 3: ask again"),
    "stall": ({}, "has not moved for 1 s"),
    "hang": ({}, "nor given a sign of life"),
    "garbage": ({"hex": "00000004c1c1c1c1"}, "cannot be understood"),
    "garbage-length": ({"hex": "ffffffff"}, "cannot be understood"),
    "hush": ({}, "said that its engine is dead"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_whoever_waits_is_told_and_it_goes_on(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    body, says = FAULTS[fault]
    async with loaded({"token_s": 0.01}, stall_timeout_s=1) as engine:
        first = await pid(engine)
        answer = await stream(engine, "chat/completions", {**ASK, "max_tokens": 900, "stream": True})
        await answer.__anext__()
        with contextlib.nullcontext() if fault == "hush" else pytest.raises(Unavailable, match=says) as caught:
            await ask(engine, f"odd/{fault.partition('-')[0]}", body)
        if fault != "hush":
            assert caught.value.status == 503
            assert caught.value.retry_after_s
            assert caught.value.code == "engine_restarting"
            assert isinstance(caught.value, EngineDied)
            assert not caught.value.alone  # the stream was there, too
        with pytest.raises(Unavailable, match=says):
            _ = [chunk async for chunk in answer]
        if engine.state == "restarting":
            assert not engine.healthy()
            with pytest.raises(Unavailable, match=says):
                await ask(engine, "chat/completions", ASK)
            assert engine.stats().last_words
        await until(engine.healthy)
        assert (engine.restarts, engine.stats().restarts) == (1, 1)
        assert await pid(engine) != first
        assert not psutil.pid_exists(first)
        assert (await ask(engine, "chat/completions", ASK))["choices"]
        assert "1 requests were told so" in caplog.text or "2 requests were told so" in caplog.text
        if fault == "exit":  # what it printed may be what somebody else asked: for the log only
            assert "ended with exit 3: an odd engine loads / ValueError: out of luck; " in caplog.text
            assert "out of luck" not in caught.value.message


async def test_a_start_that_fails_later_is_tried_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_AGAIN_S", (0.0, 0.05))
    fail_while = tmp_path / "once"
    async with loaded({"fail_while": str(fail_while)}) as engine:
        fail_while.touch()
        with pytest.raises(Unavailable):
            await ask(engine, "odd/kill", {})
        await until(engine.healthy)
        assert engine.restarts == 2
        assert (await ask(engine, "chat/completions", ASK))["choices"]


async def test_who_has_served_is_down_no_longer_than_it_had_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delays are for starts that fail. Somebody who kills it over and over must not keep it from the others."""
    monkeypatch.setattr(supervising, "_AGAIN_S", (0.0, 600.0))
    async with loaded() as engine:
        for _ in range(3):
            await killed(engine)
        assert engine.restarts == 3


async def test_what_the_process_started_ends_with_it() -> None:
    async with loaded() as engine:
        grandchild = (await ask(engine, "odd/spawn", {}))["pid"]
        with pytest.raises(Unavailable):
            await ask(engine, "odd/kill", {})
        await until(lambda: not psutil.pid_exists(grandchild) or _is_zombie(grandchild))


def _is_zombie(number: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    return True


async def test_what_the_process_logs_has_its_level_in_our_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aim.engine")

    async def said(**body: Any) -> list[tuple[int, str]]:
        caplog.clear()
        await ask(engine, "odd/say", body)
        await ask(engine, "odd/say", {"hex": b"the end\n".hex()})
        await until(lambda: "the end" in caplog.text)
        return [(record.levelno, record.getMessage()) for record in caplog.records][:-1]

    async with loaded(log_levels={"aim": "WARNING"}) as engine:
        assert await said(level=logging.ERROR, text="on fire") == [(logging.ERROR, "model m: aim.odd: on fire")]
        assert await said(level=logging.INFO, text="fine") == []
        assert await said(level=logging.WARNING, text="one\ntwo") == [
            (logging.WARNING, "model m: aim.odd: one"),
            (logging.WARNING, "model m: two"),
        ]
        assert await said(hex=b"printed, not logged\n".hex()) == [(logging.INFO, "model m: printed, not logged")]
    async with loaded(log_levels={"aim": "DEBUG"}) as engine:
        assert await said(level=logging.DEBUG, text="so") == [(logging.DEBUG, "model m: aim.odd: so")]


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (b"\x1b[2J\x1b[31mred\x07", r"\x1b[2J\x1b[31mred\x07"),
        (b" 10 %\r 50 %\r100 %\r", "100 %"),
        (b"safe\r2026-01-01 INFO aim.server: forged", "2026-01-01 INFO aim.server: forged"),
        (b"\xff\xfe\x00", r"\ufffd\ufffd\x00".replace(r"\ufffd", "\ufffd")),
        ("a\u2028b\u0085c\u202ed".encode(), r"a\u2028b\x85c\u202ed"),
        ("日本\u3000語 🙂\t.".encode(), "日本\u3000語 🙂\t."),
        (b"<3>" + b"y" * 5000, "y" * 2000),
    ],
)
def test_what_a_process_prints_is_one_line_that_commands_no_terminal(
    printed: bytes, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aim.engine")
    words = Words("m")
    words.data_received(printed + b"\n")
    (record,) = caplog.records
    assert record.getMessage() == f"model m: {shown}"
    assert words.last == shown[:300].strip()


async def test_a_process_that_floods_its_output_is_read_and_cut_short(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aim.engine")
    async with loaded() as engine:
        flood = asyncio.create_task(ask(engine, "odd/flood", {"lines": 200_000}))
        while not flood.done():
            assert (await ask(engine, "chat/completions", ASK))["choices"]
        assert (await flood)["lines"] == 200_000
        assert (engine.restarts, engine.healthy()) == (0, True)
    assert "lines left out" in caplog.text
    assert len([record for record in caplog.records if "xxxx" in record.getMessage()]) <= 2000


@pytest.mark.parametrize("odd", ["never_closes", "hang"])
async def test_a_process_that_does_not_end_is_ended(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "CLOSE_S", 0.3)
    async with loaded({"never_closes": odd == "never_closes"}) as engine:
        number = await pid(engine)
        if odd == "hang":
            asked = asyncio.create_task(ask(engine, "odd/hang", {}))
            await asyncio.sleep(0.2)
            await engine.drain(0.1)
            with pytest.raises(Unavailable, match="shutting down"):
                await asked
    assert not psutil.pid_exists(number)


async def test_drained_requests_finish_and_a_dead_parent_takes_the_process_along() -> None:
    async with loaded({"token_s": 0.01}) as engine:
        asked = asyncio.create_task(ask(engine, "chat/completions", ASK))
        await asyncio.sleep(0.05)
        await engine.drain(20)
        assert (await asked)["choices"]
    code = (
        "import asyncio, pathlib\n"
        "from aim_runtime.engines.base import Engine, EngineDied, EngineSpec, RequestContext\n"
        "from aim_runtime.supervisor import launch\n"
        "from aim_runtime.supervisor.remote import RemoteEngine\n"
        "launch.CHILD = 'odd_child'\n"
        "async def run():\n"
        "    engine = RemoteEngine(launch.Launch(EngineSpec('odd', pathlib.Path('/x'), 'm')))\n"
        "    await engine.load()\n"
        "    print((await engine.operations['odd/pid']({}, RequestContext('r')))['pid'], flush=True)\n"
        "    asyncio.ensure_future(engine.operations['odd/hang']({}, RequestContext('r')))\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(run())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    await asyncio.sleep(0.2)
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    await until(lambda: not psutil.pid_exists(child) or _is_zombie(child))


# --- adapters ---------------------------------------------------------------------------------------------------------


async def test_adapters_are_loaded_in_the_process_and_again_in_the_next(tmp_path: Path) -> None:
    engine = engine_of()
    assert not hasattr(engine, "load_adapter")
    try:
        await engine.load()
        await engine.load_adapter("a", tmp_path)
        await engine.load_adapter("b", tmp_path)
        await engine.unload_adapter("b")
        assert engine.adapters == ("a",)
        with pytest.raises(NotFound, match="no such adapter"):
            await engine.load_adapter("c", tmp_path / "c")
        left = asyncio.create_task(engine.load_adapter("d", tmp_path))
        await asyncio.sleep(0.01)
        left.cancel()
        await until(lambda: engine.adapters == ("a", "d"))
        with pytest.raises(Unavailable):
            await ask(engine, "odd/kill", {})
        await until(engine.healthy)
        assert engine.adapters == ("a", "d")
    finally:
        await engine.close()


async def test_who_leaves_before_its_request_has_begun_leaves_nothing_behind() -> None:
    """The request and its abort in one frame: the process reads both before it begins with either."""
    service, engine = Service(), FakeEngine("m")
    await engine.load()
    service.start(engine)
    for number in range(20):
        question = Ask(number, "chat/completions", ASK, "r", {}, 0, None)
        service.data_received(bytes(encode([question, Abort(number)])))
    await until(lambda: not service._tasks)
    assert not service._streams
    assert not engine.seen


async def killed(engine: RemoteEngine) -> None:
    """Its process, and the next one is ready."""
    before = engine.restarts
    with pytest.raises(EngineDied) as caught:
        await ask(engine, "odd/kill", {})
    assert caught.value.alone
    await until(lambda: engine.restarts > before and engine.healthy())


async def test_an_adapter_of_the_start_that_was_unloaded_or_replaced_stays_so_in_the_next_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {name: tmp_path / name for name in ("a", "b", "c", "d")}
    for path in paths.values():
        path.touch()
    async with loaded({"adapters": {name: str(path) for name, path in paths.items() if name != "d"}}) as engine:
        assert engine.adapters == ("a", "b", "c")
        await engine.unload_adapter("a")
        await engine.load_adapter("b", paths["d"])
        paths["a"].unlink()  # whoever has unloaded it may delete it: the model must start again without it
        await killed(engine)
        assert set(engine.adapters) == {"b", "c"}
        assert (await ask(engine, "odd/paths", {}))["paths"]["b"] == str(paths["d"])
        await engine.load_adapter("a", paths["d"])
        paths["c"].unlink()  # in use, but gone: the model serves without it, and the log says so
        await killed(engine)
        assert set(engine.adapters) == {"a", "b"}
        assert "the adapter c is not loaded again" in caplog.text


async def test_an_adapter_that_the_engine_brings_by_itself_stays_unloaded(tmp_path: Path) -> None:
    async with loaded({"own_adapter": "x"}) as engine:
        assert engine.adapters == ("x",)
        await engine.unload_adapter("x")
        await killed(engine)
        assert engine.adapters == ()
        await engine.load_adapter("x", tmp_path)
        await killed(engine)
        assert engine.adapters == ("x",)


async def test_a_process_that_dies_while_it_loads_its_adapters_again_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_AGAIN_S", (0.0, 0.05))
    fuse = tmp_path / "fuse"
    async with loaded({"die_while": str(fuse)}) as engine:
        for name in ("a", "b", "c"):
            await engine.load_adapter(name, tmp_path)
        fuse.touch()
        await killed(engine)
        assert engine.restarts == 2
        assert engine.adapters == ("a", "b", "c")


# --- proof ------------------------------------------------------------------------------------------------------------


async def test_what_an_engine_must_show_is_asked_of_every_later_process_before_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervising, "_AGAIN_S", (0.0, 0.05))
    found: list[tuple[str, bool]] = []

    async def prove(engine: Engine) -> None:
        found.append((engine.stats().state or "", engine.healthy()))
        answer = await engine.operations["chat/completions"](ASK, RequestContext("proof"))
        assert isinstance(answer, dict)
        if len(found) == 2:
            raise ModelLoadError("it answers nonsense")

    async with loaded() as engine:
        await prove(engine)
        engine.prove = prove
        await killed(engine)
        assert engine.restarts == 2  # the first of them did not show it
        assert found == [("ready", True), ("restarting", False), ("restarting", False)]
        assert (await ask(engine, "odd/paths", {}))["seen"] == ["proof"]
