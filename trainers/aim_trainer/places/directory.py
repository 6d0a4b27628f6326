"""A directory of this machine, or of a volume that is mounted here."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aim_trainer.errors import StoreError

from .place import Entry, checked

#: What a file is called until it is whole: ours to write, nobody's to read.
_UNFINISHED = ".unfinished-"
#: What is read as a whole: a template, prompts, a policy, a commit.
SMALL_BYTES = 64 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Directory:
    """Writes beside the file and renames: a reader, and a power cut, find the old file or the new one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.uri = str(root)

    def at(self, name: str) -> Directory:
        return Directory(self._root / checked(name, self.uri))

    def path(self) -> Path:
        return self._root

    def files(self) -> tuple[Entry, ...]:
        with local_errors(self.uri):
            return tuple(sorted(self._found()))

    def _found(self) -> Iterator[Entry]:
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = Path(folder, name)
                if _UNFINISHED not in name and path.is_file():
                    yield Entry(path.relative_to(self._root).as_posix(), path.stat().st_size)

    def folders(self) -> tuple[str, ...]:
        with local_errors(self.uri):
            if not self._root.is_dir():
                return ()
            return tuple(sorted(path.name for path in self._root.iterdir() if path.is_dir()))

    def exists(self, name: str) -> bool:
        return self._file(name).is_file()

    def read(self, name: str, into: Path) -> Path:
        with local_errors(self._file(name)):
            _whole(into, lambda part: shutil.copyfile(self._file(name), part))
        return into

    def read_bytes(self, name: str) -> bytes:
        with local_errors(self._file(name)):
            return _small(self._file(name))

    def write(self, name: str, file: Path) -> None:
        with local_errors(self._file(name)):
            _whole(self._file(name), lambda part: shutil.copyfile(file, part))

    def write_bytes(self, name: str, data: bytes) -> None:
        with local_errors(self._file(name)):
            _whole(self._file(name), lambda part: part.write_bytes(data))

    def remove(self, name: str = "") -> None:
        path = self._file(name) if name else self._root
        with local_errors(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._root / checked(name, self.uri)


def _small(path: Path) -> bytes:
    """A pipe would be waited for, and a device has no end."""
    if path.exists() and not path.is_file():
        raise StoreError(f"{path}: no regular file", field=str(path), remedy="name a file")
    if path.stat().st_size > SMALL_BYTES:
        raise StoreError(f"{path}: larger than {SMALL_BYTES >> 20} MiB", field=str(path), remedy="name the right file")
    return path.read_bytes()


def _whole(path: Path, fill: Callable[[Path], object]) -> None:
    """A file that `fill` writes beside `path`, put there when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
    try:
        fill(part)
        _to_disk(part)
        part.replace(path)
        _to_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def local_errors(path: object) -> Iterator[None]:
    """What the operating system says of files as ours. Raises StoreError that names `path`, or the file in it."""
    try:
        yield
    except OSError as error:
        named = str(error.filename2 or error.filename)
        inside = named.startswith(f"{path}/") and _UNFINISHED not in named
        raise local_error(named if inside else path, error) from error


def local_error(path: object, error: OSError) -> StoreError:
    """What the operating system says of a file, with what to do about it."""
    if error.errno in _FULL:
        problem, remedy = "no space left", "free some, or name another place"
    elif isinstance(error, FileNotFoundError):
        problem, remedy = "no such file", "check the path"
    elif isinstance(error, PermissionError):
        problem, remedy = "not allowed", "check who owns it and its mode"
    else:
        problem, remedy = error.strerror or type(error).__name__, "check the disk or volume"
    return StoreError(f"{path}: {problem}", field=str(path), remedy=remedy)
