"""IN: OpenAI's batch lines, all of them checked before the first is asked.

A line's body is kept as it was written. What is held in memory does not grow with the file, but for a bit per line; the
ids are in a temporary database on disk while they are compared.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, get_args

import msgspec

Url = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]

MOST_LINE_BYTES = 64 * 2**20
#: So many wrong lines are named before the rest is only counted.
_SHOWN = 10
_TOGETHER = 10_000
_MOST_SHOWN = 300
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_A_FILE = "give a file of batch lines (JSON Lines)"

_REMEDIES = {
    "custom_id": "give each line a text of 1 to 512 characters of its own",
    "method": "give POST",
    "url": f"give one of {', '.join(get_args(Url))}",
    "body": "give the request as an object",
}
_KEYS = f"a line has {', '.join(_REMEDIES)} and nothing else"


class BatchError(Exception):
    """The input cannot be used; nothing was asked. A line for each problem, with what to do about it."""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request. ``body``: JSON, byte for byte as it stands in the file."""

    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Url
    body: msgspec.Raw


class _Body(msgspec.Struct):
    stream: Any = None


class Input:
    """The file, checked; ``count`` lines that are not blank.

    Raises:
        BatchError: it cannot be read, or a line of it is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._problems: list[str] = []
        self._wrong = 0
        self._file = _opened(path)
        self._seen = self._version()
        self._ids = sqlite3.connect("")  # a temporary file, gone with the connection
        try:
            self._ids.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16000;")
            self._ids.execute("CREATE TABLE ids (custom_id TEXT PRIMARY KEY, at INTEGER, line INTEGER) WITHOUT ROWID")
            self.sha256 = self._check()
        except OSError as error:
            self.close()
            raise BatchError(f"{path}: {error.strerror}: {_A_FILE}") from None
        except BaseException:
            self.close()
            raise

    def at(self, custom_id: str) -> int | None:
        """The place of that line among those that are not blank, from 0; None: there is none."""
        found = self._ids.execute("SELECT at FROM ids WHERE custom_id = ?", (custom_id,)).fetchone()
        return None if found is None else int(found[0])

    def forget_ids(self) -> None:
        """``at`` is not asked any more."""
        self._ids.close()

    def close(self) -> None:
        """Nothing is asked any more."""
        self._ids.close()
        self._file.close()

    def lines(self, done: bytearray) -> Iterator[Line]:
        """Those whose bit is not set, one after the other.

        Raises:
            BatchError: the file is not what was checked any more.
        """
        self._file.seek(0)
        for at, (_, text) in enumerate(self._texts()):
            if self._version() != self._seen:
                break
            if not done[at >> 3] >> (at & 7) & 1:
                yield msgspec.json.decode(text, type=Line)
        if self._version() != self._seen:
            raise BatchError(f"{self.path}: changed while its lines were asked: give it as it was")

    def _version(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        """(number in the file, text) of the lines that are not blank."""
        number = 0
        while text := self._file.readline(MOST_LINE_BYTES + 1):
            number += 1
            if text.strip():
                yield number, text

    def _check(self) -> str:
        digest = hashlib.sha256()
        rows: list[tuple[str, int, int]] = []
        for number, text in self._texts():
            digest.update(text)
            if text.startswith(_MARKS):
                raise BatchError(f"{self.path}:{number}: begins with a byte order mark: save it as UTF-8 without one")
            if len(text) > MOST_LINE_BYTES:
                raise BatchError(f"{self.path}:{number}: longer than {MOST_LINE_BYTES} bytes: is it JSON Lines?")
            try:
                rows.append((_checked(text), self.count, number))
            except BatchError as error:
                self._wrong_line(number, str(error))
            self.count += 1
            if len(rows) == _TOGETHER:
                self._insert(rows)
                rows = []
        self._insert(rows)
        if self._wrong:
            more = self._wrong - len(self._problems)
            raise BatchError("\n".join([*self._problems, *([f"and {more} more wrong lines"] if more else [])]))
        if not self.count:
            raise BatchError(f"{self.path}: has no lines: {_KEYS}")
        return digest.hexdigest()

    def _insert(self, rows: list[tuple[str, int, int]]) -> None:
        before = self._ids.total_changes
        self._ids.executemany("INSERT OR IGNORE INTO ids VALUES (?, ?, ?)", rows)
        if self._ids.total_changes - before == len(rows):
            return
        for custom_id, _, number in rows:
            (first,) = self._ids.execute("SELECT line FROM ids WHERE custom_id = ?", (custom_id,)).fetchone()
            if first != number:
                self._wrong_line(number, f"custom_id: {custom_id!r} is that of line {first}: {_REMEDIES['custom_id']}")

    def _wrong_line(self, number: int, problem: str) -> None:
        self._wrong += 1
        if len(self._problems) < _SHOWN:
            self._problems.append(f"{self.path}:{number}: {problem}")


def _opened(path: Path) -> BinaryIO:
    """Raises BatchError: not there, or nothing that can be read twice."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # waits for no pipe
    except OSError as error:
        raise BatchError(f"{path}: {error.strerror}: {_A_FILE}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BatchError(f"{path}: is read twice, which a pipe or device cannot be: {_A_FILE}")
    return file


def shown(text: str) -> str:
    """Of what somebody else wrote: on one line, and no longer than people read."""
    plain = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_MOST_SHOWN])
    return plain + "…" * (len(text) > _MOST_SHOWN)


def _checked(text: bytes) -> str:
    """The line's id.

    Raises:
        BatchError: what is wrong with the line.
    """
    try:
        line = msgspec.json.decode(text, type=Line)
        line.custom_id.encode()
    except RecursionError:
        raise BatchError("no batch line: nested too deeply: give a body that a server can read") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise BatchError(_explained(error)) from None
    try:
        body = msgspec.json.decode(line.body, type=_Body)
    except RecursionError:
        raise BatchError("body: nested too deeply: give a body that a server can read") from None
    except msgspec.DecodeError as error:
        raise BatchError(f"body: {error}: {_REMEDIES['body']}") from None
    if body.stream:
        raise BatchError("body.stream: true, but an answer in a file is whole: leave it out")
    return line.custom_id


def _explained(error: Exception) -> str:
    found = re.search(r"`\$\.(\w+)|field `(\w+)`", str(error))
    field = next(filter(None, found.groups()), "") if found else ""
    what = str(error).partition(" - at `$")[0]
    return f"{shown(field) or 'no batch line'}: {shown(what)}: {_REMEDIES.get(field, _KEYS)}"
