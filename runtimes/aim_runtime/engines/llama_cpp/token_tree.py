"""A vocabulary as a tree: below each token those that begin with its bytes.

A grammar that refuses a token's bytes refuses all that begin with them. So the tokens it allows are found from the
root down, trying a few hundred where trying all takes 20 ms with a simple grammar and seconds with thousands of
alternatives. Pure: knows bytes and numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class TokenTree:
    """Args:
    pieces: the bytes of each token; one without bytes is in no tree.
    leaves: tokens that stand for themselves whatever their bytes (the end of an answer): always tried.
    """

    def __init__(self, pieces: Sequence[bytes], leaves: Collection[int] = ()) -> None:
        count = len(pieces)
        parents = np.full(count, count)  # the last is the root
        path: list[int] = []
        for token in sorted((t for t in range(count) if pieces[t] and t not in leaves), key=pieces.__getitem__):
            while path and not pieces[token].startswith(pieces[path[-1]]):
                path.pop()
            parents[token] = path[-1] if path else count
            path.append(token)
        kept = np.array([t for t in range(count) if pieces[t] or t in leaves], dtype=np.int64)
        self._children: Ids = kept[np.argsort(parents[kept], kind="stable")]
        bounds = np.searchsorted(parents[self._children], np.arange(count + 2))
        self._starts, self._counts = bounds[:-1], np.diff(bounds)

    def allowed(self, test: Callable[[Ids], NDArray[np.bool_]]) -> Ids:
        """The tokens that ``test`` allows.

        Args:
            test: of an array of tokens, which it allows. It allows no token below one that it refuses.
        """
        found = []
        tokens = self._below(np.array([len(self._starts) - 1]))
        while tokens.size:
            tokens = tokens[test(tokens)]
            found.append(tokens)
            tokens = self._below(tokens)
        return np.concatenate(found) if found else tokens

    def _below(self, tokens: Ids) -> Ids:
        counts = self._counts[tokens]
        ends = np.cumsum(counts)
        offsets = np.arange(ends[-1] if ends.size else 0) - np.repeat(ends - counts, counts)
        below: Ids = self._children[np.repeat(self._starts[tokens], counts) + offsets]
        return below
