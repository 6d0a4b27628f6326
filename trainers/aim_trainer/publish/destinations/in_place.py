"""A directory or an S3 prefix: `v1/`, `v2/` …, COMMIT.json last in each, `latest` names the newest."""

from __future__ import annotations

import json
from pathlib import Path

from aim_trainer.errors import StoreError
from aim_trainer.places.place import Place
from aim_trainer.publish.versions import COMMIT, Commit, name_of, number_of

from .claims import claimed

_CLAIMS = ".claims"
#: A file that holds the name of the newest whole version.
POINTER = "latest"


class InPlace:
    """As the protocol says. Claims are empty files `.claims/v3.MARK`."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def uri(self, number: int) -> str:
        return f"{self._place.uri}/{name_of(number)}"

    def check(self) -> None:
        self.published()
        with claimed(self, 0):  # no version has that number
            pass

    def published(self) -> dict[int, str | None]:
        names = [entry.name for entry in self._place.files()]
        begun = {number for name in names if (number := _number_in(name)) is not None}
        return {number: self._digest(number) if _commit(number) in names else None for number in begun}

    def add(self, number: int, files: Path, commit: Commit) -> bool:
        with claimed(self, number) as alone:
            if not alone or self._place.at(name_of(number)).files():
                return False
            for path in commit.files:
                self._place.write(f"{name_of(number)}/{path}", files / path)
            self._place.write_bytes(_commit(number), commit.text().encode())
        self._point()
        return True

    def marks(self, number: int) -> list[str]:
        prefix = f"{name_of(number)}."
        names = [entry.name for entry in self._place.at(_CLAIMS).files()]
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def leave(self, number: int, mark: str) -> None:
        self._place.write_bytes(f"{_CLAIMS}/{name_of(number)}.{mark}", b"claimed\n")

    def take_back(self, number: int, mark: str) -> None:
        self._place.remove(f"{_CLAIMS}/{name_of(number)}.{mark}")

    def _point(self) -> None:
        """Looks again after each write: of publishers that point at once, the last to write sees the newest."""
        pointed = 0
        while (newest := self._newest()) != pointed:
            self._place.write_bytes(POINTER, f"{name_of(newest)}\n".encode())
            pointed = newest

    def _newest(self) -> int:
        names = {entry.name for entry in self._place.files()}
        return max(number for name in names if (number := _number_in(name)) and name == _commit(number))

    def _digest(self, number: int) -> str:
        try:
            return str(json.loads(self._place.read_bytes(_commit(number)))["digest"])
        except (ValueError, KeyError, TypeError) as problem:
            where = f"{self.uri(number)}/{COMMIT}"
            raise StoreError(
                f"{where}: not what a publication leaves",
                field=where,
                remedy="publish elsewhere, or remove that version",
            ) from problem


def _commit(number: int) -> str:
    return f"{name_of(number)}/{COMMIT}"


def _number_in(path: str) -> int | None:
    """3 of `v3/config.json` and of `.claims/v3.MARK`."""
    folder, _, rest = path.partition("/")
    return number_of(rest.partition(".")[0] if folder == _CLAIMS else folder) if rest else None
