"""What was trained on, in the words of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .chart import bars
from .read import Rows

_MOST_SOURCES, _MOST_BARS = 20, 24
_COUNTS = {
    "dropped": "longer than maxSeqLength, left out",
    "truncated": "longer than maxSeqLength, cut",
    "untrained": "left out: the cut took all that is trained",
    "duplicates": "say what an earlier row says",
    "held_out": "left out: they are held out",
}
_MASKS = {
    "trl": "told by TRL's training template",
    "marked": "told by the template's own marks",
    "prefixes": "told by prefixes of the rendered text, each checked token for token",
}


def rows_in_words(training: Rows | None, validation: Rows | None) -> dict[str, Any]:
    """Labelled facts and a histogram; none where nothing was tokenised yet."""
    if training is None or not len(training.lengths):
        return {"data": [], "histogram": ""}
    return {
        "data": [*_sizes(training, validation), *_told(training.about.get("statistics")), ("digest", training.digest)],
        "histogram": bars(_histogram(training.lengths)),
    }


def _sizes(training: Rows, validation: Rows | None) -> Iterator[tuple[str, str]]:
    lengths = training.lengths
    middle, long = (int(np.quantile(lengths, share, method="lower")) for share in (0.5, 0.95))
    yield "training rows", f"{len(lengths):,}"
    yield "held-out rows", f"{len(validation.lengths) if validation else 0:,}"
    yield "tokens", f"{int(lengths.sum()):,}"
    yield "tokens of a row", f"{middle:,} in the middle, {long:,} at 95 %, {int(lengths[-1]):,} at most"


def _told(statistics: Any) -> Iterator[tuple[str, str]]:
    """What the writer of the rows counted."""
    if not isinstance(statistics, dict):
        return
    trained, share = statistics.get("trained_tokens"), statistics.get("trained_share")
    if isinstance(trained, int) and isinstance(share, float):
        yield "trained tokens", f"{trained:,} ({share:.1%}), {_MASKS.get(str(statistics.get('masks')), 'all of them')}"
    for key, said in _COUNTS.items():
        if count := statistics.get(key):
            yield key.replace("_", " "), f"{count:,} rows: {said}"
    for source in statistics.get("sources", [])[:_MOST_SOURCES]:
        ignored = source.get("ignored")
        unread = f"; fields that nobody reads: {', '.join(ignored)}" if ignored else ""
        yield "source", f"{source.get('uri')}: {source.get('rows'):,} rows, {source.get('format')}{unread}"


def _histogram(lengths: npt.NDArray[np.int64]) -> list[tuple[str, int]]:
    counts, edges = np.histogram(lengths, bins=min(_MOST_BARS, max(4, len(np.unique(lengths)))))
    return [(f"{int(edge):,}", int(count)) for edge, count in zip(edges, counts, strict=False)]
