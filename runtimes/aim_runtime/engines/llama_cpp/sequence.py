"""One choice of one request, from its prompt's tokens to its last delta."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aim_kserve.errors import ServingError

from .sampling import Sampler, SamplingParams, TokenIds
from .scoring import PromptScores
from .text import AnswerText, TokenLogprob

if TYPE_CHECKING:  # the library behind it is imported by load()
    from .adapters import Adapter
    from .constraint import Constraint


@dataclass(frozen=True, slots=True)
class Generation:
    """What is to be generated. Lengths in tokens; ``logprobs`` None means none, 0 the chosen token's only;
    ``prompt_logprobs``: the same of the prompt's own tokens."""

    prompt: TokenIds
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stops: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    shown: frozenset[int] = frozenset()  # control tokens that are part of the text
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(slots=True)
class Delta:
    """What one step adds to one choice. ``finish_reason`` or ``error`` is set on the last."""

    choice: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # with a prompt's first delta
    generated: int = 0  # tokens of this choice so far
    cached: int = 0  # prompt tokens that were in the cache
    finish_reason: str | None = None
    error: ServingError | None = None
    waited: tuple[float, float] | None = None  # with a first token: seconds to a slot, and from there

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def merge(self, later: Delta) -> None:
        """Take in the delta that follows: a consumer that is behind gets one longer chunk."""
        self.text += later.text
        self.logprobs.extend(later.logprobs)
        self.prompt_logprobs = self.prompt_logprobs or later.prompt_logprobs
        self.generated, self.cached = later.generated, later.cached
        self.finish_reason, self.error = later.finish_reason, later.error
        self.waited = self.waited or later.waited


#: Takes a sequence's deltas, in the event loop it was submitted from.
Sink = Callable[[Delta], None]


class Sequence:
    """State of one choice. After ``submit`` it belongs to the decode thread, but for ``cancelled``.

    Args:
        generation: what to generate.
        choice: index of the choice in the answer.
        sink: takes the deltas.
        priority: lower is served first.
        leader: another choice of the same prompt to wait for, so that its prompt is computed once.
        adapter: computes with it; None: with the model alone.
    """

    def __init__(
        self,
        generation: Generation,
        choice: int,
        sink: Sink,
        *,
        priority: int = 0,
        leader: Sequence | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.generation = generation
        self.choice = choice
        self.sink = sink
        self.loop = asyncio.get_running_loop()
        self.priority = priority
        self.leader = leader
        self.adapter = adapter
        #: What computes it: cached tokens are of use to sequences of the same weights only, and a step has one.
        self.weights = adapter.digest if adapter else ""
        self.arrival = 0  # set on submission
        self.cancelled = False
        self.finished = False
        self._made_at = time.monotonic()
        self._placed_at: float | None = None
        self.scored = False  # the prompt's log probabilities are on their way to the client
        self.cached = 0
        self.text = AnswerText(generation.stops)
        wanted = generation.prompt_logprobs if leader is None else None  # followers' prompts are the leader's
        self.scores = None if wanted is None else PromptScores(generation.prompt, wanted)
        self.sampler = Sampler(generation.sampling, generation.prompt, choice)
        self._tokens = np.empty(len(generation.prompt) + generation.max_tokens, dtype=np.int32)
        self._tokens[: len(generation.prompt)] = generation.prompt
        self.length = len(generation.prompt)

    @cached_property
    def stop_ids(self) -> NDArray[np.int64]:
        """The stop tokens as an index."""
        return np.fromiter(self.generation.stop_tokens, np.int64, len(self.generation.stop_tokens))

    @property
    def tokens(self) -> TokenIds:
        """Prompt and answer so far."""
        return self._tokens[: self.length]

    @property
    def generated(self) -> int:
        return self.length - len(self.generation.prompt)

    def prompt_left(self, computed: int) -> int:
        """Tokens of the prompt after the first ``computed``."""
        return max(0, len(self.generation.prompt) - computed)

    @property
    def scoring(self) -> bool:
        """Whether log probabilities of its prompt are still to come: every token of it must be computed then."""
        return self.scores is not None and not self.scores.complete

    @property
    def may_start(self) -> bool:
        """Followers wait until their leader's prompt is in the cache."""
        return self.leader is None or self.leader.finished or self.leader.generated > 0

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.arrival

    def place(self, cached: int) -> None:
        """It has a slot, where ``cached`` of its tokens are computed already. Of one that is parked and placed again
        the first time counts."""
        if self._placed_at is None:
            self._placed_at, self.cached = time.monotonic(), cached

    def append(self, token: int) -> None:
        self._tokens[self.length] = token
        self.length += 1
        self.sampler.accept(token)

    def delta(self, **fields: object) -> Delta:
        scores = self.scores.entries if self.scores is not None and not self.scored else []
        self.scored = self.scored or bool(scores)
        return Delta(
            self.choice,
            generated=self.generated,
            cached=self.cached,
            prompt_logprobs=scores,
            waited=self._waited() if self.generated == 1 else None,
            **fields,  # type: ignore[arg-type]
        )

    def _waited(self) -> tuple[float, float] | None:
        placed_at = self._placed_at
        return None if placed_at is None else (placed_at - self._made_at, time.monotonic() - placed_at)
