"""`metrics.jsonl`: a line of JSON for each record, and how it is read again.

{"record": "step", "time": 1790000000.0, "step": 7, "loss": 1.93, …}
{"record": "evaluation" | "saved" | "note", "time": …, …}

Numbers that are none (a loss that is NaN) stand as null and are read as NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from pydantic import TypeAdapter

from .records import Evaluation, Note, Record, Saved, Step

_KINDS: dict[str, type[Step | Evaluation | Saved | Note]] = {
    "step": Step,
    "evaluation": Evaluation,
    "saved": Saved,
    "note": Note,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_READ = {name: TypeAdapter(kind).validate_python for name, kind in _KINDS.items()}
_MOST_STEPS = 2**53  # more are no whole numbers everywhere
#: A line that is longer was not written by us.
LONGEST_LINE_BYTES = 1_048_576


class Told(NamedTuple):
    """A record and when it was told, in seconds since 1970."""

    time: float
    record: Record


class JsonLines:
    """Appends each record at once, so that whoever reads the file sees it, and other processes may append too.

    The first step told drops what an earlier process told of that step and later ones: it died after its last
    checkpoint, and those steps are made again. So a step stands once.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._cut = False

    def tell(self, record: Record) -> None:
        """Raises OSError: the disk is full or away. What was written before stays readable."""
        if isinstance(record, Step) and not self._cut:
            _drop_from(self._file, record.step)
            self._cut = True
        line = _line({"record": _NAMES[type(record)], "time": time.time(), **dataclasses.asdict(record)})
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # Read too: a line that was cut short by a kill or a full disk gets its end, so that ours stands alone.
        with self._file.open("a+b", buffering=0) as file:
            end = file.tell()
            torn = bool(end) and (file.seek(end - 1), file.read(1))[1] != b"\n"
            file.write(b"\n" * torn + line + b"\n")

    def close(self) -> None:
        """Nothing is held open."""


def read_records(file: Path) -> Iterator[Told]:
    """The records in their order, one line in memory at a time; a file that is not there has none.

    Lines that are no record, as a torn last one is, are passed over. Raises OSError.
    """
    try:
        with file.open("rb") as lines:
            while line := lines.readline(LONGEST_LINE_BYTES):
                told = _record(line)
                if told is not None:
                    yield told
    except FileNotFoundError:
        return


def _line(content: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY, default=str)
    except TypeError:  # half of a surrogate pair, in a message of somebody else's
        return json.dumps(content, ensure_ascii=False, default=str).encode(errors="replace")


def _record(line: bytes) -> Told | None:
    try:
        found = orjson.loads(line)
        read, told_at = _READ[found.pop("record")], float(found.pop("time"))
        record: Record = read({name: _number(name, value) for name, value in found.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Told(told_at, record) if _counts(record) else None


def _counts(record: Record) -> bool:
    """Whether its steps are such as there can be."""
    if isinstance(record, Note):
        return True
    steps = record.steps if isinstance(record, Step) else max(record.step, 1)
    return 0 <= record.step < _MOST_STEPS and 1 <= steps < _MOST_STEPS


def _number(name: str, value: Any) -> Any:
    if name == "metrics":
        return {key: math.nan if inner is None else float(inner) for key, inner in value.items()}
    return math.nan if value is None and name != "gpu_memory_bytes" else value


def _drop_from(file: Path, step: int) -> None:
    """Rewrites the file without records of `step` and later; notes stay. Nothing is written if there are none."""
    if not any(_of_step(told.record, step) for told in read_records(file)):
        return
    partial = file.with_name(file.name + ".part")
    with file.open("rb") as lines, partial.open("wb") as kept:
        while line := lines.readline(LONGEST_LINE_BYTES):
            told = _record(line)
            if told is not None and not _of_step(told.record, step):
                kept.write(line.rstrip(b"\n") + b"\n")
    partial.replace(file)


def _of_step(record: Record, step: int) -> bool:
    return not isinstance(record, Note) and record.step >= step
