"""Models of another directory or file of this machine (a mounted volume, a model somebody copied here)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from aim_runtime.cache.errors import CacheError, Changed
from aim_runtime.cache.source import CHUNK_BYTES, Listing, RemoteFile
from aim_runtime.cache.uri import ModelUri, safe_path


class Disk:
    """A directory, or one file."""

    def __init__(self, uri: ModelUri) -> None:
        self._root, self._text = Path(uri.location), uri.text

    def listing(self) -> Listing:
        try:
            if self._root.is_file():
                return Listing("", (self._file(self._root, self._root.name),))
            if not self._root.is_dir():
                raise CacheError(f"{self._root}: no such directory or file")
            return Listing(
                "", tuple(self._file(path, path.relative_to(self._root).as_posix()) for path in self._files())
            )
        except FileNotFoundError as error:
            raise Changed(f"{error.filename} went while its directory was listed") from error
        except OSError as error:
            raise CacheError(f"{error.filename or self._root}: {error.strerror or error}") from error

    def _files(self) -> list[Path]:
        """Links to files are followed: Hugging Face's own layout is made of them. What is hidden, or in a hidden
        directory, serves nothing; a cache below its own source is one.
        """
        found = []
        for folder, inner, names in os.walk(self._root, onerror=_refuse):
            inner[:] = [name for name in inner if not name.startswith(".")]
            found += [path for name in names if not name.startswith(".") and (path := Path(folder, name)).is_file()]
        return sorted(found)

    def _file(self, path: Path, name: str) -> RemoteFile:
        validator = _validator(path)
        return RemoteFile(safe_path(name, self._text), int(validator.partition("-")[0]), str(path), validator=validator)

    @contextmanager
    def read(self, file: RemoteFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        path = Path(file.locator)
        try:
            opened = path.open("rb")
        except FileNotFoundError as error:
            raise Changed(f"{path} went before it was copied") from error
        except OSError as error:
            raise CacheError(f"{path}: {error.strerror or error}") from error
        with opened:
            if _validator(path) != file.validator:
                raise Changed(f"{path} changed while it was copied")
            opened.seek(offset)
            yield offset, _chunks(opened.read)
            if _validator(path) != file.validator:
                raise Changed(f"{path} changed while it was copied")


def _refuse(error: OSError) -> NoReturn:
    raise error


def _validator(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def _chunks(read: object) -> Iterator[bytes]:
    while data := read(CHUNK_BYTES):  # type: ignore[operator]
        yield data
