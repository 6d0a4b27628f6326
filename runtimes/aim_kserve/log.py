"""Where a process says what it does. Imports nothing heavy: it comes before what does."""

from __future__ import annotations

import logging
import sys
import unicodedata
from collections.abc import Mapping
from typing import Any

from aim_kserve.redacted import redacted

#: Loggers that tell of every request what the access log tells.
NOISY = ("kserve", "uvicorn", "httpx")


class OneLine(logging.Formatter):
    """A record is one line, whatever stands in it; a trace's lines are indented. So that what somebody sends, or an
    engine prints, never looks like a line of ours, nor commands a terminal. Nor does a credential stand in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return redacted(printable(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {redacted(printable(line))}" for line in super().formatException(ei).split("\n"))


def printable(text: str) -> str:
    """``text`` with control characters (line ends and escape sequences among them), half characters and marks that turn
    the direction of writing in the form ``\\x1b``."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    plain = character.isprintable() or character == "\t" or unicodedata.category(character) == "Zs"
    return character if plain else character.encode("unicode_escape").decode()


def log_to_stderr(level: int = logging.INFO, formatter: logging.Formatter | None = None) -> None:
    """Plain lines on stderr for what the process does; requests go to the JSON access log on stdout."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter or OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def set_levels(levels: Mapping[str, str]) -> None:
    """Logger ("": the root) → its level."""
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
