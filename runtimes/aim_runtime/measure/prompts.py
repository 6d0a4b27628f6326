"""Prompts of a given number of tokens out of a bundled list of words, with the starts they share.

Every prompt is its own: one that was asked before would be found in a server's prefix cache, and flatter it. How many
tokens a word is, is asked of the server's `/tokenize` where it has one, else estimated.
"""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache
from importlib.resources import files

#: Tokens a common English word has, where nobody can be asked.
ESTIMATED_TOKENS_PER_WORD = 1.05

Blocks = tuple[tuple[str, int], ...]


@lru_cache
def word_list() -> tuple[str, ...]:
    """Short common English words, most of them one token with the space before."""
    return tuple(files("aim_runtime.measure").joinpath("words.txt").read_text(encoding="utf-8").split())


class Prompts:
    """Makes prompts, always the same ones of the same seed.

    tokens_per_word: of this server's vocabulary; digest: of every prompt made so far.
    """

    def __init__(self, seed: int, tokens_per_word: float = ESTIMATED_TOKENS_PER_WORD) -> None:
        self._seed, self._per_word = seed, tokens_per_word
        self._made = 0
        self._digest = hashlib.sha256()
        self._shared: dict[tuple[str, int], str] = {}

    @property
    def digest(self) -> str:
        """`sha256:…`, equal where the same prompts were asked in the same order."""
        return f"sha256:{self._digest.hexdigest()[:16]}"

    def make(self, tokens: int, blocks: Blocks = ()) -> str:
        """A text of about so many tokens that starts with the blocks' texts, as far as they are no longer than it."""
        parts: list[str] = []
        left = tokens
        for name, size in blocks:
            size = min(size, left - 1)
            if size <= 0:
                break
            parts.append(self._block(name, size))
            left -= size
        self._made += 1
        parts.append(self._text(f"prompt {self._made}", left))
        text = " ".join(parts)
        self._digest.update(text.encode() + b"\0")
        return text

    def _block(self, name: str, tokens: int) -> str:
        if (name, tokens) not in self._shared:
            self._shared[name, tokens] = self._text(f"block {name}", tokens)
        return self._shared[name, tokens]

    def _text(self, what: str, tokens: int) -> str:
        source = random.Random(f"{self._seed} {what}")
        return " ".join(source.choices(word_list(), k=max(1, round(tokens / self._per_word))))
