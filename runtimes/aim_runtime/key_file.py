"""A file that holds the API key a verb sends: the key alone, so that none stands in a command line."""

from __future__ import annotations

from pathlib import Path

_MOST_CHARACTERS = 8192  # of a token (docs/identity.md)


def read_key(file: Path) -> str:
    """The key.

    Raises:
        ValueError: one line, without what the file holds.
    """
    try:
        with file.open(encoding="utf-8") as opened:
            key = opened.read(_MOST_CHARACTERS + 2).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"{file}: {reason}: give a file that holds the key") from None
    if len(key) > _MOST_CHARACTERS or len(key.split()) != 1 or not (key.isascii() and key.isprintable()):
        raise ValueError(f"{file}: must hold the key alone, on one line")
    return key
