"""A file that is read again when it changes; while it is wrong, what was good before goes on counting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from aim_profile.errors import AimProfileError

_Read = TypeVar("_Read")
_Stamp = tuple[int, int, int]


class Followed(Generic[_Read]):
    """`load(file)`, again whenever the file is another one.

    Raises what `load` raises, at the start only, and never where the file `may_lack`: then it may be wrong or not there
    at the start, come and go.
    """

    def __init__(self, file: Path, load: Callable[[Path], _Read], *, may_lack: bool = False) -> None:
        self._file, self._load, self._may_lack = file, load, may_lack
        self._seen: _Stamp | None = None
        self._value: _Read | None = None
        self.problem: AimProfileError | None = None
        if may_lack:
            self.now()
        else:
            self._seen, self._value = self._stamp(), load(file)

    def now(self) -> _Read | None:
        """The newest that could be read, `problem` says why it is not the newest there is; None: there is none."""
        stamp = self._stamp()
        if stamp is None and self._may_lack:
            self._seen = self._value = self.problem = None
        elif stamp != self._seen:
            self._seen = stamp
            try:
                self._value, self.problem = self._load(self._file), None
            except AimProfileError as problem:
                self.problem = problem
        return self._value

    def _stamp(self) -> _Stamp | None:
        # Kubernetes replaces a ConfigMap's files as a whole: time and number of the file that the link leads to.
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size
