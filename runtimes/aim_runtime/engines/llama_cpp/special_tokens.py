"""Where a text may be cut so that its parts, tokenized one by one, give the tokens of the whole.

llama.cpp first splits a text at its special tokens, and every split walks the list of those before it
(``tokenizer_st_partition`` in llama-vocab.cpp: ``std::distance``): a prompt of 200,000 special tokens takes minutes.
Parts of a few thousand characters take linear time. Pure: knows texts, not the library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

#: Characters a part may have when it holds more than one special token.
PART_CHARACTERS = 4096
#: Cuts tried in one part before a longer one is accepted: special tokens that overlap are rare.
_TRIES = 16
_LONGEST = 200  # the pattern below is built by recursion, a character a level; real ones have 30 at most


class SpecialTokens:
    """Cuts before special tokens.

    Args:
        texts: of all tokens that the vocabulary treats as special.
        glued: those of them that take in white space before them, or begin with it: no cut before these.
    """

    def __init__(self, texts: Iterable[str], glued: Iterable[str] = ()) -> None:
        known = [text for text in texts if 0 < len(text) <= _LONGEST]
        self._special = re.compile(_alternatives(known)) if known else None
        self._glued = frozenset(glued)
        self._longest = max(map(len, known), default=0)

    def parts(self, text: str, most: int = PART_CHARACTERS) -> Iterator[str]:
        """``text`` in order, cut at special tokens where it is longer than ``most`` characters."""
        start = 0
        while len(text) - start > most:
            cut = self._cut(text, start, most)
            yield text[start:cut]
            start = cut
        if start < len(text) or not text:
            yield text[start:]

    def _cut(self, text: str, start: int, most: int) -> int:
        """The last place to cut in a window, or the first in the next windows that have one."""
        if self._special is None:
            return len(text)
        for window in range(start, len(text), most):
            end = min(len(text), window + most + self._longest)
            places = [found.start() for found in self._special.finditer(text, window, end)]
            for place in reversed(places[-_TRIES:]):
                if start < place <= window + most and self._parts_at(text, place):
                    return place
        return len(text)

    def _parts_at(self, text: str, place: int) -> bool:
        """Whether the special token at ``place`` is one for llama.cpp too, which takes the longest first wherever it
        stands: only shorter ones may overlap it. And whether it takes in nothing that stands before it."""
        here = self._match(text, place)
        if here is None or here[0] in self._glued:
            return False
        around = (self._match(text, at) for at in range(max(0, place - self._longest + 1), here.end()) if at != place)
        return all(other is None or other.end() <= place or len(other[0]) < len(here[0]) for other in around)

    def _match(self, text: str, place: int) -> re.Match[str] | None:
        return None if self._special is None else self._special.match(text, place)


def _alternatives(texts: Iterable[str]) -> str:
    """A pattern that matches the longest of ``texts``. Shared beginnings are tried once, whatever their number."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return _pattern(tree)


def _pattern(node: dict[str, Any]) -> str:
    branches = [re.escape(character) + _pattern(rest) for character, rest in node.items() if character]
    if not branches:
        return ""
    body = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return body + "?" if "" in node else body
