"""OUT: a line for every custom_id, written whole or not at all, however often the process is killed.

Beside it lies ``OUT.batch``, which says of which IN it is, and is locked while a process writes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import orjson

from aim_kserve.durable import sync_directory

from .lines import BatchError, Input, shown


class _Began(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    input_sha256: str


class _Response(msgspec.Struct):
    status_code: int


class _Answered(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: Any = None


class Answers:
    """Opens OUT, cuts a last line that is not whole, and reads what is answered already.

    Attributes:
        done: a bit for each line of IN, in its order.
        count, failed: lines in OUT, and those of them that are errors.

    Raises:
        BatchError: it is of another IN, of no batch, damaged, or another process writes it.
    """

    def __init__(self, path: Path, source: Input) -> None:
        self.path, self._source = path, source
        self.done = bytearray((source.count + 7) // 8)
        self.count = self.failed = 0
        self._files: list[int] = []
        for each in (path, Path(f"{path}.batch")):
            if each.exists() and each.samefile(source.path):
                raise BatchError(f"{each}: is the input itself: give another OUT")
        try:
            self._open()
        except OSError as error:
            self.close()
            raise BatchError(f"{path}: {error.strerror}: give an OUT that can be written") from None
        except BatchError:
            self.close()
            raise

    def add(
        self, custom_id: str, status: int, request_id: str, body: bytes, error: dict[str, str] | None = None
    ) -> None:
        """An HTTP answer, whatever its status.

        Args:
            error: ``code`` and ``message`` of what the status does not say.

        Raises:
            OSError: the disk is full, or gone.
        """
        response = {"status_code": status, "request_id": request_id, "body": _json(body)}
        self._write(custom_id, response, error, failed=status >= 300 or error is not None)

    def add_failure(self, custom_id: str, code: str, message: str) -> None:
        """There is no HTTP answer. Raises as :meth:`add`."""
        self._write(custom_id, None, {"code": code, "message": message}, failed=True)

    def sync(self) -> None:
        """What has been added is on the disk. May take long.

        Raises:
            OSError: it is not, or nobody will find it there.
        """
        os.fsync(self._file)
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._file)):
            raise OSError(errno.ENOENT, "was moved or removed while it was written: put it back", str(self.path))

    def close(self) -> None:
        """Another process may write it."""
        while self._files:
            os.close(self._files.pop())

    def _write(self, custom_id: str, response: Any, error: Any, *, failed: bool) -> None:
        line = {"id": f"batch_req_{os.urandom(12).hex()}", "custom_id": custom_id, "response": response, "error": error}
        rest = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self.count += 1
        self.failed += failed

    def _open(self) -> None:
        beside = Path(f"{self.path}.batch")
        lock = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
        self._files.append(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"{beside}: another process writes this batch: wait for it, or give another OUT") from None
        self._begin(lock)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._files.append(self._file)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise BatchError(f"{self.path}: is no file that can be read again: give another OUT")
        self._resume()
        sync_directory(self.path.parent)

    def _begin(self, beside: int) -> None:
        """Say of which IN it is, or see that it is the same."""
        said = os.pread(beside, 4096, 0)
        empty = not self.path.exists() or not self.path.stat().st_size
        began: _Began | None = None
        try:
            began = msgspec.json.decode(said, type=_Began)
        except msgspec.DecodeError:
            if not empty:
                raise BatchError(f"{self.path}: was not begun by this command: give another OUT") from None
            if said:
                raise BatchError(
                    f"{self.path}.batch: is not this command's: move it away, or give another OUT"
                ) from None
        if began is None or (empty and began.version == 1):
            began = _Began(1, self._source.sha256)
            os.ftruncate(beside, 0)
            os.pwrite(beside, msgspec.json.encode(began), 0)
            os.fsync(beside)
        if began.version != 1:
            raise BatchError(f"{self.path}.batch: version {began.version}, but this command knows 1: give another OUT")
        if began.input_sha256 != self._source.sha256:
            raise BatchError(
                f"{self.path}: has answers to another input than {self._source.path} is now: give another OUT, or the "
                "input as it was"
            )

    def _resume(self) -> None:
        whole_bytes = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    break  # torn: asked again
                self._take(number, text)
                whole_bytes += len(text)
        os.ftruncate(self._file, whole_bytes)

    def _take(self, number: int, text: bytes) -> None:
        where = f"{self.path}:{number}"
        try:
            answered = msgspec.json.decode(text, type=_Answered)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            said = shown(str(error))
            raise BatchError(f"{where}: is no answer ({said}): take that line out, or give another OUT") from None
        at = self._source.at(answered.custom_id)
        if at is None:
            raise BatchError(
                f"{where}: custom_id {shown(answered.custom_id)!r} is not in {self._source.path}: take that line out"
            )
        if self.done[at >> 3] >> (at & 7) & 1:
            raise BatchError(f"{where}: custom_id {answered.custom_id!r} was answered before: take that line out")
        self.done[at >> 3] |= 1 << (at & 7)
        self.count += 1
        self.failed += answered.response is None or answered.response.status_code >= 300 or answered.error is not None


def _json(body: bytes) -> Any:
    """As it was sent where it is JSON on one line; text that is none as a string."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace")
    return parsed if b"\n" in body or b"\r" in body else orjson.Fragment(body)
