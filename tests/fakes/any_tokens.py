"""A small vocabulary, and a sampler that takes any token a constraint allows: no model, and no mercy."""

from __future__ import annotations

import random

import numpy as np

from aim_runtime.engines.llama_cpp.constraint import Constraint

_LONGER = (
    b'", "', b'":', b'{"', b'"}', b'"]', b"}}", b'\\"', b"\\\\", b"\\n", b"\\u00", b"\\u0041", b"\\/", b"true", b"null",
    b"fals", b"   ", b"\n\n", b"-0", b"e+9", b"999", b".0", b"00", "🙂".encode(), "🙂".encode()[:3], "é".encode(),
    "é\"".encode(), "\u2028".encode(), b"ab", b"20", b"\xed\xa0", b"[1,", b" ,", b"\x7f",
)  # fmt: skip
_CLOSERS = b'"}]'


class AnyTokens:
    """Every byte, some longer tokens, and control tokens: what a model's vocabulary has, small enough to be fast."""

    def __init__(self) -> None:
        self._pieces = [bytes([byte]) for byte in range(256)] + list(_LONGER) + [b"", b"", b""]
        self.vocabulary_size = len(self._pieces)
        self.end_tokens = frozenset((self.vocabulary_size - 1, self.vocabulary_size - 2))

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self._pieces[token] or (b"<|%d|>" % token if special else b"")


def answer(constraint: Constraint, tokens: AnyTokens, seed: int, most: int = 400) -> bytes | None:
    """A complete document, or None when ``most`` tokens did not complete one."""
    chance = random.Random(seed)
    position = constraint.begin()
    text = b""
    for count in range(most):
        logits = np.zeros(tokens.vocabulary_size, dtype=np.float32)
        position.mask(logits)
        allowed = np.flatnonzero(np.isfinite(logits)).tolist()
        ends = tokens.end_tokens & set(allowed)
        assert bool(ends) == position.complete
        if ends and (len(ends) == len(allowed) or chance.random() < 0.3):
            return text
        closing = [token for token in allowed if token < 256 and token in _CLOSERS]
        closes = closing and chance.random() < min(0.6, count / 100)
        token = chance.choice(closing if closes else [token for token in allowed if token not in ends])
        position.accept(token)
        text += tokens.piece(token)
    return None
