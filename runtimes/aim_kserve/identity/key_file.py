"""A key that we send ourselves, in a file that holds it alone: none stands in a command line, and it may change."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from aim_kserve.identity.files import Follower, read_bounded, signature

logger = logging.getLogger("aim.identity")

_MOST_BYTES = 16 * 1024  # a token of an identity provider is 1 to 4 KiB
_KEY = re.compile(rb"[!-~]+")


def read_key(file: Path) -> bytes:
    """The key that a file holds: one word of visible ASCII.

    Raises:
        ValueError: it holds none; never with what it holds.
    """
    try:
        key = read_bounded(file, _MOST_BYTES).strip()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}): give a readable file that holds the key alone") from error
    except ValueError:
        key = b""  # too large
    if not _KEY.fullmatch(key):
        raise ValueError("does not hold one key: give a file of one word, visible ASCII, at most 16 KiB")
    return key


class KeyFile:
    """A key in a file, read again when the file has changed. While it cannot be read, the last good one serves.

    Args:
        called: what the log calls the file: the flag or field that named it.

    Attributes:
        key: as it stood in the file when it was last looked at; `follow` looks once a second.

    Raises:
        ValueError: it holds no key to begin with; never with what it holds.
    """

    def __init__(self, file: Path, called: str) -> None:
        self._file, self._called = file, called
        self._seen = signature(file)
        self.key = read_key(file)
        self._follower = Follower(f"key file of {called}", self.look)

    def follow(self) -> KeyFile:
        """Look from now on, in a thread of its own."""
        self._follower.start()
        return self

    def close(self) -> None:
        """Look no more."""
        self._follower.stop()

    def look(self) -> None:
        """Read the file if it is another than the one last seen."""
        seen = signature(self._file)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.key = read_key(self._file)
        except ValueError as error:
            logger.warning("%s %s: %s; the last good key serves", self._called, self._file, error)
        else:
            logger.info("%s %s: read anew", self._called, self._file)
