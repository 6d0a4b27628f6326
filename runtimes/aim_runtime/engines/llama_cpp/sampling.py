"""From a row of logits to one token. Knows numpy and nothing about any engine.

The order of the steps is vLLM's: logit bias, penalties, temperature, then min-p, top-k and top-p on the tempered
distribution. Presence and frequency penalties count generated tokens only, the repetition penalty also the
prompt's (vLLM's and Hugging Face's reading; OpenAI has no repetition penalty).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int32]

#: Below this temperature vLLM samples greedily too (``_SAMPLING_EPS``): dividing by less overflows float32.
GREEDY_BELOW_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How one token is chosen. ``top_k`` 0 and ``min_p`` 0 mean off; ``temperature`` 0 means greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None

    @cached_property
    def biased(self) -> tuple[NDArray[np.int64], Logits]:
        """The tokens of ``logit_bias`` and their biases: all choices and prompts of a request share them."""
        ids = np.array([token for token, _ in self.logit_bias], dtype=np.int64)
        return ids, np.array([bias for _, bias in self.logit_bias], dtype=np.float32)


class NoToken(Exception):
    """No token can be drawn: none is left to choose from, or the logits are no numbers."""


class Sampler:
    """Chooses one sequence's tokens; holds its random state and what it has generated.

    Args:
        params: see SamplingParams.
        prompt: the prompt's tokens, for the repetition penalty.
        choice: index of the choice; with a seed each choice has its own, reproducible stream.
    """

    def __init__(self, params: SamplingParams, prompt: TokenIds, choice: int = 0) -> None:
        self._params = params
        self._greedy = params.temperature < GREEDY_BELOW_TEMPERATURE
        entropy = None if params.seed is None else [params.seed % 2**64, choice]
        self._random = None if self._greedy else np.random.Generator(np.random.PCG64(entropy))
        self._bias_ids, self._bias = params.biased
        self._counts: Counter[int] = Counter()
        self._repeats = params.repetition_penalty != 1.0
        self._seen = set(prompt.tolist()) if self._repeats else set()
        self._penalises = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    def accept(self, token: int) -> None:
        """Note that ``token`` was generated."""
        if self._penalises:
            self._counts[token] += 1
        if self._repeats:
            self._seen.add(token)

    def adjust(self, logits: Logits) -> None:
        """Apply bias and penalties, in place. Once per token, before ``draw``."""
        if self._bias_ids.size:
            logits[self._bias_ids] += self._bias
        if self._repeats:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            row = logits[ids]
            penalty = np.float32(self._params.repetition_penalty)
            logits[ids] = np.where(row > 0, row / penalty, row * penalty)
        if self._counts:
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[ids] -= self._params.frequency_penalty * counts + np.float32(self._params.presence_penalty)

    def draw(self, logits: Logits) -> int:
        """One token from adjusted logits, which stay as they are.

        Raises:
            NoToken: all logits are -inf, or one is NaN or inf.
        """
        likeliest = int(logits.argmax())  # a NaN's place, if there is one
        if not np.isfinite(logits[likeliest]):
            raise NoToken("no token is left to choose from, or the model's logits are no numbers")
        if self._random is None:
            return likeliest
        weights = np.multiply(logits, np.float32(1.0 / self._params.temperature))
        weights -= weights.max()
        np.exp(weights, out=weights)  # relative to the likeliest token, whose weight is 1
        ids = self._candidates(weights)
        cumulative = np.cumsum(weights if ids is None else weights[ids], dtype=np.float64)
        at = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        at = min(at, cumulative.size - 1)
        return at if ids is None else int(ids[at])

    def _candidates(self, weights: Logits) -> NDArray[np.intp] | None:
        """Tokens left by min-p, top-k and top-p; None when all are."""
        params = self._params
        floor = params.min_p
        if 0 < params.top_k < weights.size:
            floor = max(floor, float(np.partition(weights, -params.top_k)[-params.top_k]))
        ids = np.flatnonzero(weights >= floor) if floor > 0 else None
        return ids if params.top_p >= 1.0 else _nucleus(weights, ids, params.top_p)


def _nucleus(weights: Logits, ids: NDArray[np.intp] | None, top_p: float) -> NDArray[np.intp]:
    """The fewest likeliest of ``ids`` whose weight reaches ``top_p`` of theirs.

    Sorting a whole vocabulary costs milliseconds. Tokens below (1 - top_p) * total / count weigh less than
    1 - top_p together, so the nucleus lies in the rest, which is short.
    """
    kept = weights if ids is None else weights[ids]
    total = float(kept.sum(dtype=np.float64))
    likely = np.flatnonzero(kept >= (1.0 - top_p) * total / kept.size)
    order = likely[np.argsort(-kept[likely], kind="stable")]
    mass = np.cumsum(kept[order], dtype=np.float64)
    order = order[: int(np.searchsorted(mass, top_p * total, side="left")) + 1]
    return order if ids is None else ids[order]


def log_probabilities(logits: Logits, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural log probabilities of ``token`` and of the ``top`` likeliest tokens, likeliest first.

    Of the model's own distribution: before bias, penalties and temperature (vLLM's ``raw_logprobs``).
    """
    peak = float(logits.max())
    normaliser = peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    if top == 0:
        return float(logits[token]) - normaliser, []
    likeliest = np.argpartition(logits, -top)[-top:]
    likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")]
    return float(logits[token]) - normaliser, [(int(i), float(logits[i]) - normaliser) for i in likeliest]
