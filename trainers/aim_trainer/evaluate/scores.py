"""How near an answer is to the one that was wanted; pure, and linear in both for texts of a bounded length."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Words of a text that ROUGE looks at; what comes after them counts as neither found nor missed.
MOST_WORDS = 4096
# A word, or one sign of a script that is written without spaces.
_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W{_SIGNS}]+")


def exact_match(answer: str, wanted: str) -> float:
    """1 if they are the same but for white space, else 0."""
    return float(answer.split() == wanted.split())


def rouge_l(answer: str, wanted: str) -> float:
    """ROUGE-L's F1 over lower-case words, 0 to 1: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.

    Two texts without any word are the same.
    """
    found, sought = _words(answer), _words(wanted)
    if not found or not sought:
        return float(found == sought)
    return 2 * _longest_common(found, sought) / (len(found) + len(sought))


def _words(text: str) -> list[str]:
    return [word.group().casefold() for _, word in zip(range(MOST_WORDS), _WORD.finditer(text), strict=False)]


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of one number: Hyyrö,
    "Bit-parallel LCS-length computation revisited", 2004. A bit that is 0 is a word matched.
    """
    places: dict[str, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << at
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(first) - row.bit_count()
