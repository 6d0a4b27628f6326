"""Rows as the model sees them, with what the loss counts marked: for people."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .tokens import Row

#: Around what is trained, where there is no colour to tell it by.
OPEN, CLOSE = "⟦", "⟧"


class Stretch(NamedTuple):
    """Neighbouring tokens that are trained alike, as text."""

    text: str
    trained: bool


def stretches(row: Row, tokenizer: Any) -> list[Stretch]:
    """A row's tokens as text, cut where the mask changes."""
    if not len(row.tokens):
        return []
    cuts = np.flatnonzero(np.diff(row.trained)) + 1
    parts = zip(np.split(row.tokens, cuts), np.split(row.trained, cuts), strict=True)
    return [Stretch(tokenizer.decode(ids.tolist()), bool(marks[0])) for ids, marks in parts]


def marked(parts: list[Stretch]) -> str:
    """One text."""
    return "".join(f"{OPEN}{part.text}{CLOSE}" if part.trained else part.text for part in parts)
