"""Reading a file that the kernel writes, or that somebody recorded: never more of it than such a file can have."""

from __future__ import annotations

from pathlib import Path


def read_bounded(file: Path, most_bytes: int) -> bytes | None:
    """Its first ``most_bytes`` and one more, which tells that it is too large; None where it is absent or refused."""
    try:
        if not file.is_file():
            return None
        with file.open("rb") as opened:
            return opened.read(most_bytes + 1)
    except (OSError, ValueError):
        return None
