"""The process's own log: a record is one line, whatever a client or an engine has put into it."""

from __future__ import annotations

import io
import logging

import pytest

from aim_kserve.log import OneLine, printable

FORGED = "x\n2026-01-01 00:00:00,000 INFO aim.server: forged\r\x1b[2J\u2028\u202e\ud800\x00"


def written(message: str, *arguments: object, error: Exception | None = None) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    handler.handle(logging.LogRecord("aim.x", logging.ERROR, "f", 1, message, arguments, (type(error), error, None)))
    return stream.getvalue()


def test_a_message_is_one_line() -> None:
    said = written("request %s failed", FORGED)
    (line, *_), forged = (
        said.split("\n"),
        r"x\n2026-01-01 00:00:00,000 INFO aim.server: forged\r\x1b[2J\u2028\u202e\ud800\x00",
    )
    assert line == f"ERROR aim.x: request {forged} failed"


def test_a_trace_is_indented() -> None:
    first, *rest = written("failed", error=ValueError(FORGED)).rstrip("\n").split("\n")
    assert first == "ERROR aim.x: failed"
    assert rest
    assert all(line.startswith("  ") and "\x1b" not in line for line in rest)


@pytest.mark.parametrize("text", ["", "plain", "ünï 日本\u3000語 🙂", "a\tb", "a\u00a0b"])
def test_what_can_be_read_stays(text: str) -> None:
    assert printable(text) == text
