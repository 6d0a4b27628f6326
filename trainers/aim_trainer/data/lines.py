"""Lines of a binary file, none held that is longer than a row may be."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

#: A row of 100,000 tokens has about half a megabyte.
MAX_ROW_BYTES = 16 << 20
_MARKS = {
    b"\xef\xbb\xbf": "begins with a UTF-8 byte order mark; save it as UTF-8 without one (tail -c +4)",
    b"\xff\xfe": "is UTF-16; save it as UTF-8 (iconv -f utf-16 -t utf-8)",
    b"\xfe\xff": "is UTF-16; save it as UTF-8 (iconv -f utf-16 -t utf-8)",
}


class FileProblem(ValueError):
    """A file that cannot be read on; what was read of it before is told of as well."""


#: Its number, from 1; None: it is longer than MAX_ROW_BYTES, and was passed over.
Line = tuple[int, bytes | None]


def unzipped(file: BinaryIO) -> BinaryIO:
    """The file (a buffered one), unpacked where it is gzip."""
    packed = isinstance(file, io.BufferedReader) and file.peek(2)[:2] == b"\x1f\x8b"
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file


def lines(file: BinaryIO) -> Iterator[Line]:
    """Each with its newline. Raises FileProblem for what is no UTF-8 from the first byte, or a torn gzip file."""
    number = 0
    try:
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1:
                _refuse_marks(line)
            if len(line) <= MAX_ROW_BYTES:
                yield number, line
                continue
            while not line.endswith(b"\n") and (line := file.readline(MAX_ROW_BYTES)):
                pass
            yield number, None
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise FileProblem(f"is a damaged gzip file after line {number} ({problem}); copy it anew") from None


def _refuse_marks(first: bytes) -> None:
    for mark, message in _MARKS.items():
        if first.startswith(mark):
            raise FileProblem(message)
    if b"\0" in first[:64]:
        raise FileProblem("is no text: it has NUL bytes; a JSONL or CSV file in UTF-8 is expected")
