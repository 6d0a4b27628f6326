"""What is wrong with rows: collected, so that a person mends them all in one go."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from aim_trainer.errors import DataError

#: Problems told of one by one; the others are counted.
SHOWN = 20
_LONGEST_KEY = 60


class RowProblem(ValueError):
    """One row cannot be trained on. `field`: as in messages[0].role; empty: the row as a whole."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)


class Problems:
    """Those of all sources of a job."""

    def __init__(self) -> None:
        self.count = 0
        self._shown: list[str] = []

    def add(self, where: str, problem: str) -> None:
        """where: a file, or file:line."""
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(f"{where}: {problem}")

    def refuse(self) -> None:
        """Raises DataError if there was any."""
        if not self.count:
            return
        more = [f"… and {self.count - SHOWN:,} more: {self.count:,} problems in all"] if self.count > SHOWN else []
        raise DataError("\n".join(self._shown + more), field="dataset", value=self.count)


def named(keys: Iterable[str], most: int = 20) -> str:
    """Some of the keys a row has, as they can stand in a message; `none` of none."""
    first = list(islice(keys, most + 1))
    told = [key if key.isprintable() and len(key) <= _LONGEST_KEY else shortened(key) for key in first[:most]]
    return ", ".join([*told, "…"] if len(first) > most else told) or "none"


def shortened(value: object, most: int = 60) -> str:
    """As it can stand in a message: one line, never more than `most` characters of it."""
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[:most]}…"
