"""Quantities as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping


def seconds_in_words(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `4 d 3 h`; `unknown` for what is no number."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def bytes_in_words(count: int) -> str:
    """`512 B`, `360.0 KiB`, `1.5 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def numbers_in_words(numbers: Mapping[str, float]) -> str:
    """`eval_loss 1.2346, perplexity 3.4367`."""
    return ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
