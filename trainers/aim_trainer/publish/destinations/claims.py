"""One publisher for a number, in places that cannot create a file only if it is not there.

Whoever wants a number leaves a claim of its own and then looks who else has one. Where writes are seen at once (a file
system, S3, a registry), of two that want one number at least one sees the other: it could miss the other's claim only
if it had looked before the other wrote, and then the other looks after both wrote. Who sees another gives way; both
may, and take the next number. A claim whose publisher was killed stays: that number is passed over.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Claims(Protocol):
    """Small marks of a place, each written and removed as a whole."""

    def marks(self, number: int) -> list[str]:
        """Every mark for that number."""
        ...

    def leave(self, number: int, mark: str) -> None: ...

    def take_back(self, number: int, mark: str) -> None: ...


@contextmanager
def claimed(claims: Claims, number: int) -> Iterator[bool]:
    """Whether the number is ours alone, for as long as the block runs."""
    mark = uuid.uuid4().hex
    claims.leave(number, mark)
    try:
        yield claims.marks(number) == [mark]
    finally:
        claims.take_back(number, mark)
