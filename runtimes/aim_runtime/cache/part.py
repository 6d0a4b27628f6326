"""A file on its way: its bytes so far, and beside them what they are of, so that a later attempt can go on."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from aim_kserve.durable import sync_directory
from aim_runtime.cache.durable import boot, write_in_place
from aim_runtime.cache.source import CHUNK_BYTES, RemoteFile

_SYNC_EVERY_BYTES = 64 * 2**20


class _Of(BaseModel):
    """What the bytes are of. ``synced``: so many survive a power cut. ``sha256``: the file is whole and verified."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    locator: str
    digest: tuple[str, str] | None
    validator: str
    boot: str
    synced: int = 0
    sha256: str = ""


class Part:
    """``with Part(directory, file) as part``: what is already here of ``file``, to be appended to.

    directory: the model's; the file grows in ``state/``, and gets its name in ``files/`` when it is verified.
    Raises OSError.
    """

    def __init__(self, directory: Path, file: RemoteFile) -> None:
        self.file = file
        self.target = directory / "files" / file.path
        word = hashlib.sha256(file.path.encode()).hexdigest()[:32]
        self._state = directory / "state" / f"{word}.json"
        self._bytes = directory / "state" / f"{word}.part"
        self._of, self._is_same = self._here()

    def _here(self) -> tuple[_Of, bool]:
        """What is recorded, and whether it is of this very file; else a fresh record."""
        fresh = _Of(
            path=self.file.path,
            size=self.file.size,
            locator=self.file.locator.partition("?")[0],  # a query may be a signature: secret, and another next time
            digest=self.file.digest,
            validator=self.file.validator,
            boot=boot(),
        )
        try:
            known = _Of.model_validate_json(self._state.read_bytes())
        except (FileNotFoundError, ValidationError):
            return fresh, False
        same = known.model_copy(update={"boot": fresh.boot, "synced": 0, "sha256": ""}) == fresh
        same = same and self.file.resumable
        return (known if same else fresh), same

    @property
    def done(self) -> str:
        """The SHA-256 of a file that was verified by an earlier attempt, and is here; else empty."""
        with contextlib.suppress(OSError):
            if self._of.sha256 and self.target.stat().st_size == self.file.size:
                return self._of.sha256
        return ""

    @property
    def size(self) -> int:
        """Bytes to go on from: all that a killed process wrote; after a power cut those that were synced."""
        try:
            here = self._bytes.stat().st_size
        except OSError:
            return 0
        if not self._is_same or here > self.file.size:
            return 0
        return here if self._of.boot and self._of.boot == boot() else min(here, self._of.synced)

    def __enter__(self) -> Self:
        keep = self.size
        self._of = self._of.model_copy(update={"boot": boot(), "sha256": "", "synced": min(self._of.synced, keep)})
        write_in_place(self._state, self._of.model_dump_json().encode())
        self._file = self._bytes.open("r+b" if keep else "w+b", buffering=0)
        self._file.truncate(keep)
        self._file.seek(0, os.SEEK_END)
        self.offset = keep
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def chunks(self) -> Iterator[bytes]:
        """The bytes that are here."""
        self._file.seek(0)
        while data := self._file.read(CHUNK_BYTES):
            yield data

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self.offset += len(data)
        if self.offset - self._of.synced >= _SYNC_EVERY_BYTES:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._of = self._of.model_copy(update={"synced": self.offset})
        write_in_place(self._state, self._of.model_dump_json().encode())

    def restart(self) -> None:
        """From zero."""
        self._file.truncate(0)
        self._file.seek(0)
        self.offset = 0
        self._of = self._of.model_copy(update={"synced": 0})
        write_in_place(self._state, self._of.model_dump_json().encode())

    def finish(self, sha256: str) -> None:
        """It is whole and verified: it gets its name, and then the record that says so."""
        os.fsync(self._file.fileno())
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._bytes.replace(self.target)
        sync_directory(self.target.parent)
        self._of = self._of.model_copy(update={"sha256": sha256, "synced": self.offset})
        write_in_place(self._state, self._of.model_dump_json().encode())
