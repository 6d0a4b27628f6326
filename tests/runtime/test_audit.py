"""The trail of admin actions: what its lines say, and that it never fails an action."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import stat
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from aim_kserve.access import AccessLog
from aim_kserve.errors import StartupError
from aim_kserve.identity import Caller, set_caller
from aim_runtime.audit import Audit


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def lines(file: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def lost(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("aim_audit_lost_lines_total")


async def test_a_line_says_who_asked_and_what_came_of_it(file: Path, registry: CollectorRegistry) -> None:
    audit = Audit.to(file, registry)
    access: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        set_caller(Caller("console", "ops", frozenset(["admin"])))
        audit("load", model="m", outcome="refused", reason="3.2 GiB short", seconds=0.25, device="card 0")
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(_: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v2/repository/models/m/load",
        "client": ("10.1.2.3", 4567),
        "headers": [(b"x-request-id", b"r-9")],
    }
    serving = AccessLog(app, write=access.append)(scope, None, send)  # type: ignore[arg-type]
    await asyncio.create_task(serving)  # whose caller stays in its context
    (line,), (request,) = lines(file), [orjson.loads(item) for item in access]
    assert abs(line.pop("ts") - request["ts"]) < 60
    assert line == {
        "audit": "load",
        "model": "m",
        "outcome": "refused",
        "reason": "3.2 GiB short",
        "seconds": 0.25,
        "client": "10.1.2.3",
        "credential": "console",
        "tenant": "ops",
        "request_id": "r-9",
        "trace_id": request["trace_id"],
        "device": "card 0",
    }


def test_what_the_process_does_itself_has_no_caller(file: Path, registry: CollectorRegistry) -> None:
    audit = Audit.to(file, registry)
    # A context of its own: pytest-asyncio hands on to later tests what a test's coroutine set.
    contextvars.Context().run(lambda: audit("evict", model="m", outcome="ok", made_room_for="n"))
    (line,) = lines(file)
    assert (line["client"], line["request_id"], line["trace_id"]) == (None, None, None)
    assert (line["audit"], line["made_room_for"]) == ("evict", "n")


def test_a_file_is_appended_to_and_may_be_rotated(file: Path, registry: CollectorRegistry) -> None:
    file.write_text('{"audit":"before"}\n')
    audit = Audit.to(file, registry)
    audit("load", model="a", outcome="ok")
    file.rename(file.with_suffix(".1"))
    audit("unload", model="a", outcome="ok")
    assert [line["audit"] for line in lines(file.with_suffix(".1"))] == ["before", "load"]
    assert [line["audit"] for line in lines(file)] == ["unload"]
    assert stat.S_IMODE(file.stat().st_mode) & 0o007 == 0  # not for everybody on the machine


def test_without_a_file_lines_go_to_stdout(registry: CollectorRegistry, capfd: pytest.CaptureFixture[str]) -> None:
    with open(os.dup(1), "w") as stdout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        Audit.to(None, registry)("load", model="m", outcome="ok")
    assert orjson.loads(capfd.readouterr().out)["audit"] == "load"


def test_a_line_that_cannot_be_written_is_counted_and_fails_nothing(
    file: Path, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    audit = Audit.to(file, registry)
    file.unlink()
    os.mkfifo(file)  # nobody reads it
    audit("unload", model="m", outcome="ok")
    assert lost(registry) == 1
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "'unload'" in said
    file.unlink()
    audit("load", model="m", outcome="ok")
    assert (lost(registry), [line["audit"] for line in lines(file)]) == (1, ["load"])


def test_fields_are_written_as_json_and_one_that_cannot_be_is_a_lost_line(
    file: Path, registry: CollectorRegistry
) -> None:
    audit = Audit.to(file, registry)
    audit("load", model='m\n"', outcome="ok", path=Path("/x"), devices={1: "card 0"})
    (line,) = lines(file)
    assert (line["model"], line["path"], line["devices"]) == ('m\n"', "/x", {"1": "card 0"})
    audit("load", model="m", outcome="ok", bytes=2**70)
    assert (len(lines(file)), lost(registry)) == (1, 1)


@pytest.mark.parametrize("where", ["missing/audit.jsonl", "."])
def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path, registry: CollectorRegistry, where: str) -> None:
    with pytest.raises(StartupError, match=r"^--audit_log .*: cannot be written \(.+\): give a file"):
        Audit.to(tmp_path / where, registry)
