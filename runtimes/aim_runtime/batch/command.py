"""``aim-runtime batch IN OUT``: OpenAI's batch lines, asked of a server in the lowest class (docs/batch.md)."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sqlite3
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

from aim_kserve.identity.key_file import read_key
from aim_runtime.engines.openai_server.connection import Connection

from .answers import Answers
from .lines import BatchError, Input
from .pace import Pace
from .run import Batch, Stopped

#: ``--concurrency auto``: never more, and with how many it begins.
_AUTO_MOST, _AUTO_START = 256, 4
_MOST = 4096
_REPORT_S = 10.0


def main(argv: Sequence[str]) -> int:
    """Entry point. Exit codes: 0 all lines are answered, 1 some ended in an error or it could not go on, 2 wrong
    input or arguments."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # while IN and OUT are read there is nothing to end in order
    given = _arguments(argv)
    try:
        connection = _connection(given)
        source = Input(given.input)
        answers = Answers(given.output, source)
    except BatchError as error:
        return _fail(str(error), 2)
    except sqlite3.Error as error:
        return _fail(f"{given.input}: its ids cannot be compared ({error}): is there room for temporary files?", 1)
    source.forget_ids()
    progress = _Progress(source, answers)
    try:
        asyncio.run(_run(given, source, answers, connection, progress))
    except (Stopped, BatchError) as error:
        return _fail(f"{error}; {progress}: run the same command again to go on", 1)
    except asyncio.CancelledError:
        return _fail(f"stopped; {progress}: run the same command again to go on", 1)
    except OSError as error:
        return _fail(f"{answers.path}: {error.strerror}; {progress}: run the same command again to go on", 1)
    _say(f"done: {progress}")
    return 1 if answers.failed else 0


async def _run(
    given: argparse.Namespace, source: Input, answers: Answers, connection: Connection, progress: _Progress
) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    most, start = (_AUTO_MOST, _AUTO_START) if given.concurrency is None else (given.concurrency, given.concurrency)
    pace = progress.pace = Pace(most, start, time.monotonic, Random())
    lines = source.lines(answers.done)
    batch = Batch(lines, answers, connection, pace, most=most, patience_s=given.patience_s, report=progress.tell)
    try:
        await batch.run()
    finally:
        await connection.close()


class _Progress:
    """What people see on stderr: a line that changes on a terminal, else one every 10 s."""

    def __init__(self, source: Input, answers: Answers) -> None:
        self._source, self._answers, self.pace = source, answers, Pace(1, 1, time.monotonic, Random())
        self._began_s = self._told_s = time.monotonic()
        self._before = answers.count
        if self._before:
            _say(f"{self._before} of {source.count} lines are answered already")

    def __str__(self) -> str:
        failed = f", {self._answers.failed} of them with an error" if self._answers.failed else ""
        return f"{self._answers.count} of {self._source.count} lines answered{failed}"

    def tell(self) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if terminal or now - self._told_s >= _REPORT_S:
            self._told_s = now
            per_s = (self._answers.count - self._before) / max(1e-9, now - self._began_s)
            text = f"{self}, {per_s:.1f} a second, up to {int(self.pace.at_once)} at once"
            print(f"\r{text}\x1b[K" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)  # noqa: T201


def _connection(given: argparse.Namespace) -> Connection:
    try:
        if given.api_key_file:
            read_key(given.api_key_file)  # before IN is read, which may take long
    except ValueError as error:
        raise BatchError(f"--api-key-file {given.api_key_file}: {error}") from None
    return Connection(given.url, most=_MOST, silence_timeout_s=given.timeout_s, key_file=given.api_key_file)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="aim-runtime batch", description=__doc__, allow_abbrev=False)
    parser.add_argument("input", metavar="IN", type=Path, help="JSON Lines: custom_id, method, url, body")
    parser.add_argument("output", metavar="OUT", type=Path, help="answers, a line each; goes on where it was cut off")
    parser.add_argument("--url", required=True, type=_url, help="the server, http://HOST:PORT")
    parser.add_argument("--api-key-file", metavar="FILE", type=Path, help="holds the key to send")
    parser.add_argument(
        "--concurrency", type=_at_once, default=None, metavar="N|auto",
        help=f"requests at once at most; auto: as many as the server takes, up to {_AUTO_MOST}",
    )  # fmt: skip
    parser.add_argument(
        "--patience-seconds", dest="patience_s", type=_seconds, default=600.0, metavar="S",
        help="seconds that the server may be out of reach (600)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout-seconds", dest="timeout_s", type=_seconds, default=3600.0, metavar="S",
        help="longest silence of a request on its way, seconds (3600)",
    )  # fmt: skip
    return parser.parse_args(argv)


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if "@" in text:
        raise argparse.ArgumentTypeError("a user and a password in an address end up in logs: give --api-key-file")
    if not good or not text.isprintable() or set("?# ") & set(text):
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is no address: give http://HOST:PORT")
    return text.rstrip("/").removesuffix("/v1")


def _at_once(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isdecimal() and 1 <= int(text) <= _MOST:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give auto, or a number from 1 to {_MOST}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of seconds above 0")
    return seconds


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        _say(f"error: {line}")
    return code


def _say(line: str) -> None:
    print(f"\r\x1b[K{line}" if sys.stderr.isatty() else line, file=sys.stderr)  # noqa: T201
