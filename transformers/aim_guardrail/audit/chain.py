"""The chain: each line of an audit says the digest of the one before, and ends with its own. Pure but for reading.

A line is JSON. Its last field is the SHA-256 of all bytes before that field, or with a key their HMAC-SHA-256
(RFC 2104):

    {"seq":2,…,"prev":"<digest of line 1>","sha256":"<digest of all of this line up to the comma>"}

Whoever changes, removes or inserts a line breaks the chain there, and cannot mend it without the key. (Without one,
all lines that follow can be made anew: keep the last digest elsewhere.) Lines cut off at the end are not missed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

START = "0" * 64
#: Of one line; the longest have a hundred findings and an excerpt.
MAX_LINE_BYTES = 1024 * 1024
_SEAL = re.compile(rb',"(sha256|hmac_sha256)":"([0-9a-f]{64})"\}\n')
_SEAL_BYTES = len(b',"hmac_sha256":"') + 64 + len(b'"}\n')


@dataclass(frozen=True, slots=True)
class Last:
    """Where a chain stands: the number and the digest of its last line."""

    seq: int = 0
    digest: str = START


def sealed(fields: dict[str, Any], last: Last, key: bytes | None) -> tuple[bytes, Last]:
    """The line of these fields that follows `last`."""
    seq = last.seq + 1
    body = orjson.dumps({"seq": seq, **fields, "prev": last.digest})[:-1]
    digest = digest_of(body, key)
    name = b"sha256" if key is None else b"hmac_sha256"
    return body + b',"%s":"%s"}\n' % (name, digest.encode()), Last(seq, digest)


def digest_of(data: bytes, key: bytes | None) -> str:
    """64 hex digits."""
    return hmac.new(key, data, "sha256").hexdigest() if key is not None else hashlib.sha256(data).hexdigest()


class Broken(ValueError):
    """A line is not the one that was written there. The message says which and why."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"line {number}: {why}")
        self.number = number


def verified(lines: Iterable[bytes], key: bytes | None, last: Last | None = None) -> tuple[int, Last]:
    """How many lines there are, and where the chain stands after them; a last line without its end is not counted.

    Args:
        lines: with their line ends.
        last: what the first of them must follow; None: whatever it says, as in a file that another was rotated to.

    Raises:
        Broken: the first line that is not as it was written.
    """
    number = 0
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            return number - 1, last or Last()
        last = _follows(number, line, key, last)
    return number, last or Last()


def _follows(number: int, line: bytes, key: bytes | None, last: Last | None) -> Last:
    seal = _SEAL.search(line, max(0, len(line) - _SEAL_BYTES))
    if seal is None or seal.end() != len(line):
        raise Broken(number, "it does not end with its digest")
    if (seal[1] == b"hmac_sha256") != (key is not None):
        raise Broken(
            number, "it was written without a key: give none" if key else "it needs the key it was written with"
        )
    body, digest = line[: seal.start()], seal[2].decode()
    if not hmac.compare_digest(digest_of(body, key), digest):
        raise Broken(number, "its digest is another: it was changed, or written with another key")
    fields = orjson.loads(body + b"}")
    follows = Last(fields["seq"] - 1, fields["prev"])
    if last is not None and follows != last:
        raise Broken(number, f"it follows line {follows.seq} of the chain, not {last.seq}: lines are missing or moved")
    return Last(fields["seq"], digest)


def last_of(line: bytes) -> Last:
    """Where the chain stands after this whole line; its digest is believed. Raises ValueError: it is none of ours."""
    seal = _SEAL.search(line, max(0, len(line) - _SEAL_BYTES))
    if seal is None or seal.end() != len(line):
        raise ValueError("its last line is none of an audit")
    return Last(int(orjson.loads(line)["seq"]), seal[2].decode())
