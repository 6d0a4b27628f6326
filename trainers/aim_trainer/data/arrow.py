"""Parquet files, and datasets of the `datasets` library: row by row, as JSON would have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from .lines import FileProblem
from .problems import RowProblem

Record = dict[str, Any]
#: Rows decoded at once.
_TOGETHER = 256
#: Arrow gives every object of a column the keys of all of them, null where a row had none.
_MIXED = (
    "Arrow has mixed the fields of all objects in this column: nobody can tell which null a person wrote; store it as "
    "JSON text (json.dumps)"
)


def parquet_rows(file: BinaryIO) -> Iterator[tuple[int, Record | RowProblem]]:
    """Row number, from 1, and its columns. Raises FileProblem."""
    try:
        batches = pq.ParquetFile(file).iter_batches(_TOGETHER)
        number = 0
        for batch in batches:
            for record in _decoded(batch, number + 1):
                number += 1
                yield number, _plain(record)
    except OSError as problem:
        if problem.errno is not None:
            raise
        raise FileProblem(f"is a damaged Parquet file: {str(problem).splitlines()[0]}; copy it anew") from None
    except (pa.ArrowException, UnicodeDecodeError) as problem:  # the latter: a column's name
        raise FileProblem(f"is no Parquet file that can be read: {str(problem).splitlines()[0]}") from None


def _decoded(batch: Any, first: int) -> list[Record]:
    try:
        rows: list[Record] = batch.to_pylist()
    except UnicodeDecodeError as problem:
        last = first + batch.num_rows - 1
        raise FileProblem(f"has text that is no UTF-8 in rows {first} to {last}: {problem.reason}") from None
    except (ArithmeticError, LookupError, ValueError) as problem:  # dates beyond Python's, zones that there are not
        last = first + batch.num_rows - 1
        raise FileProblem(f"has a value in rows {first} to {last} that cannot be read: {problem}") from None
    return rows


def dataset_columns(dataset: Any) -> list[str]:
    """Its columns' names."""
    return list(dataset.column_names)


def dataset_rows(dataset: Any) -> Iterator[tuple[int, Record | RowProblem]]:
    """Row number, from 1, and its columns; classes by their names."""
    names = {name: kind.names for name, kind in (dataset.features or {}).items() if hasattr(kind, "names")}
    for number, record in enumerate(dataset, 1):
        for column, known in names.items():
            value = record[column]
            record[column] = known[value] if isinstance(value, int) and 0 <= value < len(known) else value
        yield number, _plain(record)


def saved_dataset(directory: Path, split: str) -> Any:
    """A dataset that `save_to_disk` wrote. Raises FileProblem."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(directory))
    except (FileNotFoundError, ValueError) as problem:
        raise FileProblem(f"is no dataset that save_to_disk wrote: {problem}") from None
    return _split(loaded, split)


def hub_dataset(name: str, config: str | None, split: str, revision: str | None) -> Any:
    """A dataset of a hub, streamed. Raises FileProblem."""
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except (OSError, ValueError) as problem:
        raise FileProblem(f"cannot be had from the hub: {str(problem).splitlines()[0]}") from None


def _split(loaded: Any, split: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise FileProblem(f"has no split {split}; there are: {', '.join(loaded)} (dataset.sources[].split)")
    return loaded[split]


def _plain(record: Record) -> Record | RowProblem:
    """Without the nulls that only mean that a message has no such key."""
    try:
        for field in ("messages", "prompt", "completion", "conversations"):
            if isinstance(turns := record.get(field), list):
                record[field] = [_message(turn, f"{field}[{place}]") for place, turn in enumerate(turns)]
        if isinstance(tools := record.get("tools"), list) and _has_null(tools):
            raise RowProblem("tools", _MIXED)
    except RowProblem as problem:
        return problem
    return record


def _message(turn: Any, field: str) -> Any:
    if not isinstance(turn, dict):
        return turn
    kept = {key: value for key, value in turn.items() if value is not None}
    calls = kept.get("tool_calls")
    for place, call in enumerate(calls if isinstance(calls, list) else []):
        called = call.get("function") if isinstance(call, dict) else None
        if isinstance(called, dict) and _has_null(called.get("arguments")) and called["arguments"] is not None:
            raise RowProblem(f"{field}.tool_calls[{place}].function.arguments", _MIXED)
    return kept


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_null(part) for part in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return any(_has_null(part) for part in value)
    return value is None
