"""A sequence's next token: what its sampling draws, what its grammar allows, what ends it."""

from __future__ import annotations

import numpy as np

from .bindings import LlamaGrammar, LlamaModel
from .sampling import Logits, log_probabilities
from .sequence import Sequence

#: A token's name, its log probability, and its likeliest rivals'.
Logprob = tuple[bytes, float, list[tuple[bytes, float]]]


class Chooser:
    """Belongs to the decode thread; holds the grammars of running answers.

    Args:
        model: vocabulary and grammars.
    """

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._end_tokens = np.array(sorted(model.end_tokens), dtype=np.int64)
        self._grammars: dict[Sequence, LlamaGrammar] = {}

    def choose(self, sequence: Sequence, logits: Logits) -> tuple[int | None, Logprob | None]:
        """The next token, and its log probability when the request asks for it. ``logits`` are used up.

        No token means that the grammar leaves none: the answer is complete.
        """
        top = sequence.generation.logprobs
        raw = None if top is None else logits.copy()
        token = self._draw(sequence, logits)
        if token is None or raw is None:
            return token, None
        return token, self._logprob(raw, token, top or 0)

    def ends(self, sequence: Sequence, token: int) -> bool:
        """Whether ``token`` ends the answer. A grammar's end cannot be ignored: nothing may follow."""
        generation = sequence.generation
        if token in self._model.end_tokens and not (generation.ignore_eos and generation.grammar is None):
            return True
        return token in generation.stop_tokens

    def forget(self, sequence: Sequence) -> None:
        """Free what is held for a finished sequence."""
        grammar = self._grammars.pop(sequence, None)
        if grammar is not None:
            grammar.close()

    def _draw(self, sequence: Sequence, logits: Logits) -> int | None:
        generation = sequence.generation
        if sequence.generated < generation.min_tokens:
            logits[self._end_tokens] = -np.inf
            logits[sequence.stop_ids] = -np.inf
        sequence.sampler.adjust(logits)
        token = sequence.sampler.draw(logits)
        grammar = self._grammar(sequence)
        if grammar is None:
            return token
        if not grammar.allows(token):  # trying one token costs microseconds, masking the vocabulary milliseconds
            grammar.mask(logits)
            if not np.isfinite(logits.max()):
                return None
            token = sequence.sampler.draw(logits)
        if token not in self._model.end_tokens:
            grammar.accept(token)
        return token

    def _grammar(self, sequence: Sequence) -> LlamaGrammar | None:
        gbnf = sequence.generation.grammar
        if gbnf is None:
            return None
        if sequence not in self._grammars:
            self._grammars[sequence] = self._model.new_grammar(gbnf)
        return self._grammars[sequence]

    def _logprob(self, raw: Logits, token: int, top: int) -> Logprob:
        chosen, rivals = log_probabilities(raw, token, top)
        name = self._model.piece(token, special=True)
        return name, chosen, [(self._model.piece(rival, special=True), value) for rival, value in rivals]
