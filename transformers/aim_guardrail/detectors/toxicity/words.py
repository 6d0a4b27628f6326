"""Windows for the embedded model: words by rank, as Keras' tokenizer counted them.

Before that, spellings are made equal that look so: letters of other alphabets within a Latin word, full-width and
accented letters, invisible characters (`aim_guardrail.text`). What is rude in English and plain in another language
(*die* is German's and Dutch's commonest article) is left out where hardly a word around it is English.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from aim_guardrail.detectors.onnx.windows import Window, pieces, spans
from aim_guardrail.text import Text

TOKENS = 100

FALSE_FRIENDS = frozenset(["die", "dick", "fart", "slut", "ass", "cum", "kill"])
_AROUND = 6  # words on either side
_LEAST_AROUND = 4
_COMMON_RANK = 300  # half the words of any English sentence
_ENGLISH_SHARE = 0.25

#: What Keras' tokenizer, and a blank, leaves of a text. https://keras.io/api/preprocessing/text
_WORD = re.compile(r"""[^\s!"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~]+""")
_LETTERS = re.compile(r"[^\W\d_]+")
_LATIN = re.compile("[A-Za-z]")
_LOOK_ALIKES = dict(
    zip(map(ord, "аеорсхіуѕјһԁԛԝАВЕКМНОРСТХУІЅЈαορτυνκι"), "aeopcxiysjhdqwABEKMHOPCTXYISJaoptuvki", strict=True)
)


class WordWindows:
    """Cuts texts into windows of `TOKENS` known words; what it does not know is left out, as in training.

    A window is filled up with zeros in front: the model was trained so, and all have one shape.
    """

    def __init__(self, words: Iterable[str]) -> None:
        """``words`` by rank: the first has token 1."""
        self._ranks = {word: rank for rank, word in enumerate(words, start=1)}
        self._false_friends = {self._ranks[word] for word in FALSE_FRIENDS if word in self._ranks}

    def windows(self, text: str) -> Iterator[Window]:
        """As `Windower` says."""
        for begin, piece in pieces(text):
            folded = Text(piece if piece.isascii() else _LETTERS.sub(_latin, piece))
            known = self._known(folded.scan)
            for first, last in spans(len(known), TOKENS):
                row = np.zeros(TOKENS, np.int64)
                row[TOKENS - (last - first) :] = [rank for rank, _, _ in known[first:last]]
                start, end = folded.span(known[first][1], known[last - 1][2])
                yield Window(row, begin + start, begin + end)

    def _known(self, scan: str) -> list[tuple[int, int, int]]:
        """The ranks of the words that are known, and where they stand."""
        words = list(_WORD.finditer(scan))
        ranks = [self._ranks.get(word[0].lower(), 0) for word in words]
        return [
            (rank, word.start(), word.end())
            for at, (word, rank) in enumerate(zip(words, ranks, strict=True))
            if rank and (rank not in self._false_friends or _is_english(ranks, at))
        ]


def _is_english(ranks: Sequence[int], at: int) -> bool:
    """Whether enough of the words around one are English's commonest; too few of them say nothing."""
    around = [*ranks[max(0, at - _AROUND) : at], *ranks[at + 1 : at + 1 + _AROUND]]
    return len(around) < _LEAST_AROUND or sum(0 < r <= _COMMON_RANK for r in around) >= _ENGLISH_SHARE * len(around)


def _latin(match: re.Match[str]) -> str:
    """A word of Latin letters, all of them."""
    return match[0].translate(_LOOK_ALIKES) if _LATIN.search(match[0]) else match[0]
