"""Bytes, MiB and GiB: GiB everywhere, GB only where a user wrote it. Spans of time."""

from __future__ import annotations

import re

from aim_profile.errors import AimProfileError

MIB = 1024**2
GIB = 1024**3

_UNIT_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KI": 1024,
    "MI": MIB,
    "GI": GIB,
    "TI": 1024 * GIB,
    "KIB": 1024,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 1024 * GIB,
}
_SPAN = re.compile(r"([0-9]{1,6})([smhdw])")
_SPAN_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_QUANTITY = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]+)\s*")


def gib(byte_count: float) -> float:
    """Bytes as GiB, rounded to a thousandth (1 MiB) for output; never used to decide."""
    return round(byte_count / GIB, 3)


def parse_memory(text: str, *, field: str = "memory") -> int:
    """`40GB` (decimal), `40GiB` or `40Gi` (binary) as bytes. A bare number is refused: it has no unit; so is nothing.

    Raises AimProfileError naming `field`.
    """
    found = _QUANTITY.fullmatch(text)
    scale = _UNIT_BYTES.get(found.group(2).upper()) if found else None
    if found is None or scale is None:
        raise AimProfileError(
            f"{field}: {text[:40]!r} is not a memory size",
            field=field,
            value=text,
            remedy="write a number with a unit, as in 40GiB, 40Gi or 40GB",
        )
    size_bytes = int(float(found.group(1)) * scale)
    if not size_bytes:
        raise AimProfileError(
            f"{field}: {text!r} is less than a byte", field=field, value=text, remedy="write how much, or leave it out"
        )
    return size_bytes


def duration_s(text: str) -> int | None:
    """`90s`, `30m`, `12h`, `90d` or `2w` as seconds; None where it is none of them."""
    found = _SPAN.fullmatch(text)
    return int(found[1]) * _SPAN_S[found[2]] if found else None
