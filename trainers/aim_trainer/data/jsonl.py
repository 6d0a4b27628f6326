"""JSON Lines: an object to a line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

import orjson

from .lines import MAX_ROW_BYTES, FileProblem, lines, unzipped
from .problems import RowProblem, shortened

Record = dict[str, Any]
# Looked for as numbers, which costs a tenth of what looking for a text of one byte does.
_BACKSLASH, _COLON, _UNDERSCORE = b"\\:_"


def json_lines(file: BinaryIO) -> Iterator[tuple[int, Record | RowProblem]]:
    """Line number, from 1, and its object or what is wrong with it. Lines of white space alone are passed over. Raises
    FileProblem.
    """
    for number, line in lines(unzipped(file)):
        if line is None:
            yield number, RowProblem("", f"longer than {MAX_ROW_BYTES >> 20} MiB; cut it into several rows")
        elif not line.isspace():
            if number == 1 and line.lstrip().startswith(b"["):
                raise FileProblem("is a JSON array; write an object to a line (jq -c '.[]' FILE > FILE.jsonl)")
            try:
                yield number, one(line)
            except RowProblem as problem:
                yield number, problem


def one(line: bytes) -> Record:
    """The object of one line. Raises RowProblem: no JSON (NaN, half a surrogate and bad UTF-8 are none), no object, a
    key that is there twice.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as problem:
        raise RowProblem("", f"no JSON: {problem}") from None
    if type(record) is not dict:
        raise RowProblem("", f"an object is expected, not {shortened(record)}")
    # Every key brings a colon, and colons in texts are in both: the line has more of them than the object written anew
    # only if a key was there twice. \u003a is a colon in disguise: then the slow parser tells. It also keeps numbers of
    # more than 64 bits as they are, which calls of tools may have. A byte is looked for first that most rows have not.
    written = _written(record, "")
    disguised = _BACKSLASH in line and b"\\u003" in line
    called = _UNDERSCORE in written and b'"tool_calls"' in written
    if disguised or called or line.count(_COLON) != written.count(_COLON):
        return dict(json.loads(line, object_pairs_hook=_unique))
    return record


def _written(value: Any, field: str) -> bytes:
    """The value as JSON; empty where it has a number of more than 64 bits. Raises RowProblem where it is too deep."""
    try:
        return orjson.dumps(value)
    except TypeError as problem:
        if "64-bit" in str(problem):
            return b""
        raise RowProblem(field, "nested too deeply: 250 levels at most") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        _name_twin(pairs)
    return made


def _name_twin(pairs: list[tuple[str, Any]]) -> NoReturn:
    twin = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
    raise RowProblem("", f"the key {shortened(twin)} is there twice in one object; only one of them can be meant")


def parsed(text: str, field: str) -> Any:
    """JSON inside a field of a row, numbers exactly as they were written. Raises RowProblem."""
    try:
        orjson.loads(text)  # the stricter one: neither NaN, nor half a surrogate, nor a number beyond all bounds
        value = json.loads(text, object_pairs_hook=_unique)
        _written(value, field)
        return value
    except RowProblem as problem:
        raise RowProblem(field, str(problem).removeprefix(f"{field}: ")) from None
    except (ValueError, RecursionError) as problem:
        raise RowProblem(field, f"no JSON: {problem} (got {shortened(text)})") from None
