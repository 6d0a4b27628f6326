"""A sequence's next token: what its sampling draws, what its constraint allows, what ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from aim_kserve.errors import BadRequest

from .bindings import LlamaModel
from .sampling import Logits, log_probabilities
from .sequence import Sequence

if TYPE_CHECKING:  # imported with the first schema
    from .constraint import Position

#: A token's name, its log probability, and its likeliest rivals'.
Logprob = tuple[bytes, float, list[tuple[bytes, float]]]


class Chooser:
    """Belongs to the decode thread; holds where running answers stand in their constraints.

    Args:
        model: the vocabulary.
    """

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._end_tokens = np.array(sorted(model.end_tokens), dtype=np.int64)
        self._positions: dict[Sequence, Position] = {}

    def choose(self, sequence: Sequence, logits: Logits) -> tuple[int | None, Logprob | None]:
        """The next token, and its log probability when the request asks for it. ``logits`` are used up.

        No token means that the constraint leaves none: the answer is complete.

        Raises:
            BadRequest: the constraint cannot be followed any further.
        """
        top = sequence.generation.logprobs
        raw = None if top is None else logits.copy()
        token = self._draw(sequence, logits)
        if token is None or raw is None:
            return token, None
        return token, self._logprob(raw, token, top or 0)

    def ends(self, sequence: Sequence, token: int) -> bool:
        """Whether ``token`` ends the answer. A constraint's end cannot be ignored: nothing may follow."""
        generation = sequence.generation
        if token in self._model.end_tokens and not (generation.ignore_eos and generation.constraint is None):
            return True
        return token in generation.stop_tokens

    def forget(self, sequence: Sequence) -> None:
        """Free what is held for a finished sequence."""
        self._positions.pop(sequence, None)

    def _draw(self, sequence: Sequence, logits: Logits) -> int | None:
        generation = sequence.generation
        position = self._position(sequence)
        if position is not None:
            position.mask(logits)
        if sequence.generated < generation.min_tokens:
            logits[self._end_tokens] = -np.inf
            logits[sequence.stop_ids] = -np.inf
        if position is not None and not np.isfinite(logits.max()):
            if position.complete:
                return None
            raise BadRequest(
                "'min_tokens' with 'stop_token_ids' forbids every token that 'response_format' allows next",
                param="min_tokens",
            )
        sequence.sampler.adjust(logits)
        token = sequence.sampler.draw(logits)
        if position is not None and token not in self._model.end_tokens:
            position.accept(token)
        return token

    def _position(self, sequence: Sequence) -> Position | None:
        constraint = sequence.generation.constraint
        if constraint is not None and sequence not in self._positions:
            self._positions[sequence] = constraint.begin()
        return self._positions.get(sequence)

    def _logprob(self, raw: Logits, token: int, top: int) -> Logprob:
        chosen, rivals = log_probabilities(raw, token, top)
        name = self._model.piece(token, special=True)
        return name, chosen, [(self._model.piece(rival, special=True), value) for rival, value in rivals]
