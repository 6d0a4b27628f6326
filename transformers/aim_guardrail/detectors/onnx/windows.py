"""Windows: a whole text as rows a model can read, by its own tokenizer. The only file that imports tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aim_guardrail.detectors.onnx.directory import ModelError

WINDOW_TOKENS = 512
PIECE_CHARS = 16_384  # tokenised at a time: the tokenizer holds the interpreter while it makes its lists
PIECE_OVERLAP_CHARS = 1024


@dataclass(frozen=True, slots=True)
class Window:
    """A row of token ids, and the code points of the text they stand for."""

    ids: NDArray[np.int64]
    start: int
    end: int


class Windower(Protocol):
    """Cuts texts into windows."""

    def windows(self, text: str) -> Iterator[Window]:
        """Windows that cover the whole text, overlapping by a fifth; none where nothing in it is a token.

        Little is done between one and the next, so that whoever has a deadline can give up.
        """


class TokenizerWindows:
    """Windows by a `tokenizer.json`, the special tokens of a single sequence around each."""

    def __init__(self, file: Path, max_tokens: int | None) -> None:
        """`max_tokens` in a window, the special ones included. Blocking. Raises ModelError."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_buffer(file.read_bytes())
        except OSError as error:
            raise ModelError(f"{file}: cannot be read ({error.strerror}): give a readable file") from None
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare exceptions
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{file}: not a tokenizer ({reason}): fetch it anew") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # those that a text spells are text
        probe = self._tokenizer.encode("a")
        marks = probe.special_tokens_mask
        before = marks.index(0) if 0 in marks else len(marks)
        after = marks[::-1].index(0) if 0 in marks else 0
        self._before, self._after = probe.ids[:before], probe.ids[len(probe.ids) - after :]
        special = before + after
        self._room = min(max_tokens or WINDOW_TOKENS, WINDOW_TOKENS) - special
        if self._room < 1:
            raise ModelError(f"{file}: {special} special tokens leave no room in {max_tokens}: raise model_max_length")

    def windows(self, text: str) -> Iterator[Window]:
        """As the protocol says."""
        for begin, piece in pieces(text):
            whole = piece.encode("utf-8", "replace").decode()  # lone surrogates
            (encoding,) = self._tokenizer.encode_batch([whole], add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
            for start, end in spans(len(ids), self._room):
                row = np.array([*self._before, *ids[start:end], *self._after], np.int64)
                yield Window(row, begin + offsets[start][0], begin + offsets[end - 1][1])


def pieces(text: str) -> Iterator[tuple[int, str]]:
    """A long text a piece at a time, overlapping, and where each begins."""
    for begin in range(0, max(1, len(text) - PIECE_OVERLAP_CHARS), PIECE_CHARS - PIECE_OVERLAP_CHARS):
        yield begin, text[begin : begin + PIECE_CHARS]


def spans(tokens: int, room: int) -> Iterator[tuple[int, int]]:
    """Windows of ``room`` tokens, overlapping by a fifth, the last flush with the end; a shorter one only if alone."""
    last = max(0, tokens - room)
    step = max(1, room - room // 5)
    for start in (*range(0, last, step), last) if tokens else ():
        yield start, min(start + room, tokens)
