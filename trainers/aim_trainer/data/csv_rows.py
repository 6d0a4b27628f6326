"""CSV and TSV: a header, then a row to a line, or to several where a quoted field has newlines."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from .lines import MAX_ROW_BYTES, FileProblem, lines, unzipped
from .problems import RowProblem, shortened

Record = dict[str, Any]


def csv_rows(file: BinaryIO, delimiter: str) -> Iterator[tuple[int, Record | RowProblem]]:
    """Line a row begins in, and its fields by the header's names, or what is wrong with it. Raises FileProblem."""
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_text(file), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        _refuse_header(header, delimiter)
        begin = reader.line_num + 1
        for row in reader:
            if len(row) == len(header):
                yield begin, dict(zip(header, row, strict=True))
            elif row:
                yield begin, RowProblem("", f"{len(row)} fields, the header has {len(header)}; quote those with commas")
            begin = reader.line_num + 1
    except csv.Error as problem:
        raise FileProblem(f"is no CSV from line {reader.line_num} on: {problem}") from None


def _text(file: BinaryIO) -> Iterator[str]:
    for number, line in lines(unzipped(file)):
        if line is None:
            raise FileProblem(f"line {number} is longer than {MAX_ROW_BYTES >> 20} MiB")
        try:
            yield line.decode()
        except UnicodeDecodeError as problem:
            raise FileProblem(
                f"line {number} is no UTF-8 ({problem.reason}, byte {problem.start}); save it as UTF-8"
            ) from None


def _refuse_header(header: list[str], delimiter: str) -> None:
    twins = sorted(name for name, times in Counter(header).items() if times > 1)
    if twins:
        raise FileProblem(f"has the column {shortened(twins[0])} twice in its header; rename one")
    if len(header) == 1 and delimiter == "," and ";" in header[0]:
        raise FileProblem("is separated by semicolons; save it with commas, or as .tsv with tabs")
