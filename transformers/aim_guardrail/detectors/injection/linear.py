"""The model: a weight for every bucket of n-grams, summed over a window by prefix sums.

A window's logit is `bias + sum(char weights) / sqrt(count) + sum(word weights) / sqrt(count)`, over the n-grams that
begin in it. Sums and counts are prefix sums over the text, so a window costs two subtractions however long it is, and
all windows together cost as much as reading the text once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aim_guardrail.detectors.injection.ngrams import NGrams, char_ngrams, word_ngrams

WINDOW_CHARS = 200
STEP_CHARS = 50
SLICE_CHARS = 16_384  # scored at a time, so that memory is bounded; the whole of a longer text is the whole of each
LEAST_CHARS = 3
NOTHING = -9.0  # the logit of a text too short to say anything

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Windows:
    """Logits of windows of a text, each from `starts` to `ends` (code points of the text as given)."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    logits: Floats


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights (signed bytes, one scale a block) and bias. Immutable, so one instance serves every thread."""

    chars: NDArray[np.int8]
    words: NDArray[np.int8]
    char_scale: float
    word_scale: float
    bias: float

    def logit(self, text: str) -> float:
        """The highest logit of any window and of the whole. `text` is in normal form."""
        return max((float(part.logits.max()) for part in self.windows(text)), default=NOTHING)

    def windows(self, text: str) -> Iterator[Windows]:
        """The windows, a slice of the text at a time; none of a text too short."""
        for begin in range(0, max(len(text) - WINDOW_CHARS, 1), SLICE_CHARS - WINDOW_CHARS):
            part = text[begin : begin + SLICE_CHARS]
            if len(part) >= LEAST_CHARS:
                starts, ends = _spans(len(part))
                yield Windows(starts + begin, ends + begin, self._logits(part, starts, ends))

    def _logits(self, text: str, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Floats:
        chars = _means(char_ngrams(text), self.chars, len(text), starts, ends)
        words = _means(word_ngrams(text), self.words, len(text), starts, ends)
        logits: Floats = self.char_scale * chars + self.word_scale * words + self.bias
        return logits


def _spans(length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every STEP_CHARS a window, the last one flush with the end; the whole text last."""
    if length <= WINDOW_CHARS:
        return np.zeros(1, np.int64), np.full(1, length, np.int64)
    starts = np.minimum(np.arange(0, length - WINDOW_CHARS + STEP_CHARS, STEP_CHARS), length - WINDOW_CHARS)
    return np.append(starts, 0), np.append(starts + WINDOW_CHARS, length)


def _means(
    ngrams: Iterable[NGrams],
    weights: NDArray[np.int8],
    length: int,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> Floats:
    """Sum of the weights over the square root of their number, for every window. Exact: the sums are of integers."""
    sums, counts = np.zeros((2, length + 1), np.int64)
    for buckets, at in ngrams:  # within one order no two begin at the same place
        sums[at + 1] += weights[buckets]
        counts[at + 1] += 1
    np.cumsum(sums, out=sums)
    np.cumsum(counts, out=counts)
    number = np.maximum(counts[ends] - counts[starts], 1)
    means: Floats = (sums[ends] - sums[starts]) / np.sqrt(number)
    return means
