"""What the rows of a run are like, in figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .tokens import Tokens


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row: percentiles of the training rows."""

    p50: int
    p95: int
    p99_9: int
    max: int


@dataclass(frozen=True)
class SourceRead:
    """ignored: fields that some row has and nobody reads. rows: those read, held-out ones among them."""

    uri: str
    format: str
    rows: int
    weight: float
    ignored: list[str]


@dataclass(frozen=True)
class Statistics:
    """rows, tokens, trained_tokens, lengths: of what is trained on; validation_rows: held out.

    dropped, truncated: rows longer than max_seq_length; untrained: left out because the cut took all that was trained;
    validation_dropped, validation_truncated: the same of held-out rows (untrained ones are dropped ones there);
    duplicates: rows that say what an earlier one says (removed: whether they were left out); held_out: training rows
    left out because validation has them. masks: how it is known what is trained (trl, marked, prefixes, plain).
    """

    rows: int
    validation_rows: int
    tokens: int
    trained_tokens: int
    lengths: Lengths
    masks: str
    dropped: int = 0
    truncated: int = 0
    untrained: int = 0
    validation_dropped: int = 0
    validation_truncated: int = 0
    duplicates: int = 0
    duplicates_removed: bool = False
    held_out: int = 0
    sources: list[SourceRead] = field(default_factory=list)

    @property
    def trained_share(self) -> float:
        """Of the tokens, those the loss counts."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def as_json(self) -> dict[str, Any]:
        """As `about.json` and `preview -o json` have it."""
        return asdict(self) | {"trained_share": self.trained_share}

    @classmethod
    def of_json(cls, told: dict[str, Any]) -> Statistics:
        """The reverse of `as_json`."""
        parts = {key: value for key, value in told.items() if key != "trained_share"}
        sources = [SourceRead(**source) for source in told["sources"]]
        return cls(**{**parts, "lengths": Lengths(**told["lengths"]), "sources": sources})


def lengths(tokens: Tokens) -> Lengths:
    """Of all rows; zeros where there is none."""
    each = tokens.lengths()
    if not len(each):
        return Lengths(0, 0, 0, 0)
    p50, p95, p99_9 = (int(np.percentile(each, percent, method="higher")) for percent in (50, 95, 99.9))
    return Lengths(p50, p95, p99_9, int(each.max()))
