"""Hashed n-grams of a text, all at once: runs of 3 to 6 characters, and of 1 to 3 words.

Each n-gram is a 64-bit polynomial hash of its code points (or of its words' hashes), mixed and cut to `BUCKET_BITS`.
Everything is integer arithmetic modulo 2^64, so that every machine finds the same buckets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CHARS = (3, 4, 5, 6)
WORDS = (1, 2, 3)
BUCKET_BITS = 18
BUCKETS = 1 << BUCKET_BITS

_Hashes = NDArray[np.uint64]
Positions = NDArray[np.int64]

_SHIFT = np.uint64(64 - BUCKET_BITS)
_BASE = np.uint64(1_000_003)
# Odd constants with well-spread bits: the golden ratio's, and two of xxHash's primes.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_PRIME_3 = np.uint64(0x165667B19E3779F9)
_WORD = re.compile(r"[^\W_]+")


class NGrams(NamedTuple):
    """N-grams of one order: their buckets, and the code point at which each begins (ascending)."""

    buckets: Positions
    starts: Positions


def char_ngrams(text: str) -> Iterator[NGrams]:
    """Of each order in CHARS; none where the text is too short."""
    mixed = code_points(text).astype(np.uint64) * _GOLDEN
    mixed ^= mixed >> np.uint64(29)
    for order, hashes in _runs(mixed, CHARS, _BASE):
        keys = (hashes ^ np.uint64(order)) * _PRIME_2
        yield NGrams((keys >> _SHIFT).astype(np.int64), np.arange(len(keys)))


def word_ngrams(text: str) -> Iterator[NGrams]:
    """Of each order in WORDS. A word is a run of letters and digits; what stands between words does not count."""
    spans = [match.span() for match in _WORD.finditer(text)]
    if not spans:
        return
    starts, ends = np.array(spans, dtype=np.int64).T
    for order, hashes in _runs(_words(code_points(text), starts, ends), WORDS, _PRIME_3):
        keys = (hashes ^ np.uint64(7 * order)) * _PRIME_2
        keys = (keys ^ (keys >> np.uint64(32))) * _GOLDEN
        yield NGrams((keys >> _SHIFT).astype(np.int64), starts[: len(keys)])


def code_points(text: str) -> NDArray[np.uint32]:
    """One number a character; a lone surrogate is kept as it is."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _runs(items: _Hashes, orders: tuple[int, ...], base: np.uint64) -> Iterator[tuple[int, _Hashes]]:
    """The polynomial hash of every `order` neighbours, each order made from the one before. Orders ascend."""
    hashes, order = items, 1
    for wanted in orders:
        while order < wanted and len(hashes) > 1:
            hashes = hashes[:-1] * base + items[order:]
            order += 1
        if order == wanted:
            yield order, hashes


def _words(points: NDArray[np.uint32], starts: Positions, ends: Positions) -> _Hashes:
    """A hash of each word, whatever its length: sums of its characters' hashes times powers of the base."""
    lengths = ends - starts
    firsts = np.cumsum(lengths) - lengths
    offsets = np.arange(int(lengths.sum())) - np.repeat(firsts, lengths)  # of each character in its word
    chars = (points[np.repeat(starts, lengths) + offsets].astype(np.uint64) + np.uint64(1)) * _GOLDEN
    chars ^= chars >> np.uint64(31)
    powers = np.full(int(lengths.max()), _BASE, dtype=np.uint64)
    powers[0] = 1
    return np.add.reduceat(chars * np.cumprod(powers, dtype=np.uint64)[offsets], firsts)
