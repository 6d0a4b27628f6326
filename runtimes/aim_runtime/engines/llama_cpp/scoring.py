"""How likely a prompt's own tokens are: ``echo`` with ``logprobs``, from which evaluations compute likelihoods."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass, field

from .sampling import Logits, TokenIds, log_probabilities
from .text import TokenLogprob

#: Rows of logits a step computes for one prompt: 32 rows of a vocabulary of 150,000 are 19 MB and some 30 ms.
ROWS_PER_STEP = 32

#: A token's bytes, special tokens written out.
Name = Callable[[int], bytes]


@dataclass(slots=True)
class PromptScores:
    """Log probabilities of a prompt's tokens, filled in as the prompt is computed. The first has none.

    Args:
        prompt: its tokens.
        top: rivals to tell of each.
    """

    prompt: TokenIds
    top: int
    entries: list[TokenLogprob] = field(default_factory=list)
    _characters: int = 0
    _decoder: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"))

    def __post_init__(self) -> None:
        self._decoder.errors = "replace"

    @property
    def complete(self) -> bool:
        return len(self.entries) == len(self.prompt)

    def add(self, position: int, logits: Callable[[int], Logits], count: int, name: Name) -> None:
        """Take in ``count`` computed tokens from ``position`` on: each row tells of the token that follows.

        Args:
            logits: the row of the n-th of them, unchanged.
        """
        if not self.entries:
            self._append(None, [], name)
        for offset in range(max(0, len(self.entries) - 1 - position), count):
            if self.complete:
                return
            token = int(self.prompt[position + offset + 1])
            chosen, rivals = log_probabilities(logits(offset), token, self.top)
            self._append(chosen, [(name(rival), value) for rival, value in rivals], name)

    def _append(self, logprob: float | None, rivals: list[tuple[bytes, float]], name: Name) -> None:
        token = name(int(self.prompt[len(self.entries)]))
        self.entries.append(TokenLogprob(token, logprob, rivals, self._characters))
        self._characters += len(self._decoder.decode(token))
