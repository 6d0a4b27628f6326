"""The model: a weight for every bucket of n-grams, summed over a window by prefix sums.

A window's logit is `bias + sum(char weights) / sqrt(count) + sum(word weights) / sqrt(count)`, over the n-grams that
begin in it. Sums and counts are prefix sums over the text, so a window costs two subtractions however long it is, and
all windows together cost as much as reading the text once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aim_guardrail.detectors.injection.ngrams import NGrams, char_ngrams, word_ngrams

WINDOW_CHARS = 200
STEP_CHARS = 50
SLICE_CHARS = 16_384  # scored at a time, so that memory is bounded; the whole of a longer text is the whole of each
SPOT_CHARS = 480
LEAST_CHARS = 3
PERIOD_CHARS = 32
NOTHING = -9.0  # the logit of a text too short to say anything

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Windows:
    """Logits of windows of a text, each from `starts` to `ends` (code points of the text as given)."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    logits: Floats


class Worst(NamedTuple):
    """The highest logit, and the code points of the text as given that it is of."""

    logit: float
    start: int
    end: int


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
        return self.worst(text).logit

    def worst(self, text: str, deadline_s: float = math.inf) -> Worst:
        """The window that scores highest, or the whole. `text` is in normal form.

        Raises:
            TimeoutError: `time.monotonic` passed the deadline.
        """
        found = [Worst(NOTHING, 0, len(text))]
        for part in self.windows(text):
            found.append(_worst(part))
            if time.monotonic() > deadline_s:
                raise TimeoutError("the text could not be judged in time")
        return max(found[1:] or found)

    def spots(self, text: str, floor: float, most: int) -> list[tuple[int, int]]:
        """Where to look closer: SPOT_CHARS around each of the worst windows from a logit on, apart from each other, at
        most so many; of a text no longer than that, all of it. `text` is in normal form.
        """
        if len(text) <= SPOT_CHARS:
            return [(0, len(text))]
        parts = list(self.windows(text))
        middles = np.concatenate([(part.starts + part.ends)[:-1] // 2 for part in parts])  # without the wholes
        logits = np.concatenate([part.logits[:-1] for part in parts])
        spots: list[tuple[int, int]] = []
        while len(spots) < most and (not spots or logits.max() >= floor):
            middle = int(middles[logits.argmax()])
            start = min(max(middle - SPOT_CHARS // 2, 0), len(text) - SPOT_CHARS)
            spots.append((start, start + SPOT_CHARS))
            logits[abs(middles - middle) < SPOT_CHARS // 2] = -np.inf
        return spots

    def windows(self, text: str) -> Iterator[Windows]:
        """The windows, a slice of the text at a time; none of a text too short."""
        for begin in range(0, max(len(text) - WINDOW_CHARS, 1), SLICE_CHARS - WINDOW_CHARS):
            part = text[begin : begin + SLICE_CHARS]
            if len(part) >= LEAST_CHARS:
                starts, ends = _spans(len(part))
                yield Windows(starts + begin, ends + begin, self._logits(part, starts, ends))

    def _logits(self, text: str, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Floats:
        by_order = list(char_ngrams(text))
        fresh = _fresh(by_order[-1], len(text))
        chars = _means(by_order, self.chars, fresh, starts, ends)
        words = _means(word_ngrams(text), self.words, fresh, starts, ends)
        logits: Floats = self.char_scale * chars + self.word_scale * words + self.bias
        return logits


def _worst(part: Windows) -> Worst:
    at = int(part.logits.argmax())
    return Worst(float(part.logits[at]), int(part.starts[at]), int(part.ends[at]))


def _spans(length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every STEP_CHARS a window, the last one flush with the end; the whole text last."""
    if length <= WINDOW_CHARS:
        return np.zeros(1, np.int64), np.full(1, length, np.int64)
    starts = np.minimum(np.arange(0, length - WINDOW_CHARS + STEP_CHARS, STEP_CHARS), length - WINDOW_CHARS)
    return np.append(starts, 0), np.append(starts + WINDOW_CHARS, length)


def _fresh(longest: NGrams, length: int) -> NDArray[np.bool_]:
    """Where in a text begins what does not repeat the PERIOD_CHARS before: what is said over and over counts once.
    Else a word written a thousand times would weigh thirty times as much as once, whichever word it is.
    """
    fresh = np.ones(length, np.bool_)
    for period in range(1, min(PERIOD_CHARS, len(longest.buckets) - 1) + 1):
        fresh[period : len(longest.buckets)] &= longest.buckets[period:] != longest.buckets[:-period]
    return fresh


def _means(
    ngrams: Iterable[NGrams],
    weights: NDArray[np.int8],
    fresh: NDArray[np.bool_],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> Floats:
    """Sum of the weights over the square root of their number, for every window. Exact: the sums are of integers."""
    sums, counts = np.zeros((2, len(fresh) + 1), np.int64)
    for buckets, at in ngrams:  # within one order no two begin at the same place
        counted = fresh[at]
        sums[at + 1] += weights[buckets] * counted
        counts[at + 1] += counted
    np.cumsum(sums, out=sums)
    np.cumsum(counts, out=counts)
    number = np.maximum(counts[ends] - counts[starts], 1)
    means: Floats = (sums[ends] - sums[starts]) / np.sqrt(number)
    return means
