"""When the first token of a request will come: from the work ahead of it, held to what really happened.

Two parts make up the raw figure. The prompt's: tokens to compute, its own and those before it, at the engine's own pace
(seconds = a + b tokens, fitted to what was seen, exponentially forgetting). The slot's: those who run end by the hazard
of their class's lengths at their age, whoever takes their place ends once in a mean length (renewal), and a slot is
there when as many are expected to have ended as are needed.

Whatever that model gets wrong is made good online: the share of real ones within each promised figure is held by the
quantiles of the last ratios real / raw (split conformal over a sliding window), with a margin that moves a little with
every miss and hit (Robbins-Monro; Gibbs and Candès, "Adaptive Conformal Inference Under Distribution Shift"). Requests
that wait for a slot and those that need not are held apart. Only what was served is learnt from.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

from aim_kserve.identity.caller import QosClass

from .lengths import Lengths
from .request import Ask
from .ticket import Ticket

#: Observations of the engine's pace weigh half as much after so many others.
_HALF_LIFE = 30
#: Until there is an observation: fast, so that nothing is refused because of a guess.
_PREFILL_S_PER_TOKEN, _DECODE_S_PER_TOKEN = 1e-5, 1e-3
#: Ratios of so many last requests are the window; with fewer than the second, the raw figure stands.
_WINDOW, _FEWEST = 150, 9
#: How far the margin (a logarithm) moves with an observation, and how far at most.
_STEP, _MOST = 0.02, 0.7
#: So many running requests stand for all, where there are more: work per prediction is bounded.
_SAMPLED = 16
#: Lengths of time are tried each so many times the one before, that many at most.
_STEP_GROWS, _STEPS = 1.4, 60
#: The 90th percentile of the normal distribution.
_Z90 = 1.2816
#: Where so many predictions were made and none could be checked for so long, all of them may have been refused because
#: of what was true before: from then on they halve in every such time, until one is let in that tells.
_UNCHECKED, _UNCHECKED_S = 20, 30.0
#: ``calibration`` looks at so many last ones.
_RECENT = 1000


@dataclass(frozen=True, slots=True)
class Prediction:
    """``q90_s``: the first token comes within it in 9 of 10 cases. ``waits``: all slots are taken. ``raw_s``: both
    figures, uncorrected. ``guessed``: before this engine had shown its pace."""

    p50_s: float
    q90_s: float
    waits: bool
    raw_s: tuple[float, float]
    guessed: bool = False


@dataclass(frozen=True, slots=True)
class Calibration:
    """``observed``: all so far. ``within_p50``, ``within_q90``: the share of the last 1000 whose first token came
    within what was promised; None: there is none."""

    observed: int
    within_p50: float | None
    within_q90: float | None


class _Line:
    """seconds = a + b tokens by exponentially forgetting least squares, a drawn towards 0 (so that tokens which are
    always as many still say what one costs)."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        keep = 0.5 ** (1 / _HALF_LIFE)
        self._n, self._x, self._y = keep * self._n + 1, keep * self._x + tokens, keep * self._y + seconds
        self._xx, self._xy = keep * self._xx + tokens * tokens, keep * self._xy + tokens * seconds

    @property
    def fits(self) -> bool:
        """Whether anything was observed."""
        return self._xx > 0

    def fitted(self) -> tuple[float, float]:
        """(a, b), neither below 0."""
        if not self.fits:
            return 0.0, _PREFILL_S_PER_TOKEN
        n = 1.1 * self._n
        per_token = max(0.0, (n * self._xy - self._x * self._y) / (n * self._xx - self._x * self._x))
        start = (self._y - per_token * self._x) / n
        return (start, per_token) if start >= 0 else (0.0, self._xy / self._xx)


class _Held:
    """Corrects a raw figure so that a share ``level`` of the real ones is within it."""

    def __init__(self, level: float) -> None:
        self._level, self._margin = level, 0.0
        self._ratios: deque[float] = deque()
        self._sorted: list[float] = []

    def corrected(self, raw_s: float) -> float:
        count = len(self._sorted)
        if count < _FEWEST:
            return raw_s
        at = math.ceil(self._level * (count + 1)) - 1
        return raw_s * self._sorted[min(at, count - 1)] * math.exp(self._margin)

    def observe(self, raw_s: float, promised_s: float, real_s: float) -> None:
        missed = real_s > promised_s
        margin = self._margin + _STEP * (missed - (1 - self._level))
        self._margin = min(_MOST, max(-_MOST, margin))
        ratio = real_s / raw_s
        self._ratios.append(ratio)
        insort(self._sorted, ratio)
        if len(self._ratios) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._ratios.popleft())]


@dataclass(slots=True)
class _Regime:
    p50: _Held = field(default_factory=lambda: _Held(0.5))
    q90: _Held = field(default_factory=lambda: _Held(0.9))


class Ttft:
    """Predictions for one engine.

    Args:
        lengths: of its answers; whoever observes them does so here, too.
        clock: seconds.
    """

    def __init__(self, lengths: Lengths, clock: Callable[[], float]) -> None:
        self._lengths, self._clock = lengths, clock
        self._prefill = _Line()
        self._decode_s = self._decoded = 0.0
        self._regimes = {True: _Regime(), False: _Regime()}
        self._observed = self._unchecked = 0
        self._checked_at = clock()
        self._within: deque[tuple[bool, bool]] = deque(maxlen=_RECENT)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A first token came so long after the dispatch. tokens: what had to be computed from then on, of its own
        prompt and of those dispatched before that had no first token yet (:func:`to_prefill`)."""
        if tokens > 0 and seconds > 0:
            self._prefill.observe(tokens, seconds)

    def decoded(self, tokens: int, seconds: float) -> None:
        """One answer got so many tokens after its first in so long."""
        if tokens > 0 and seconds > 0:
            keep = 0.5 ** (1 / _HALF_LIFE)
            self._decode_s, self._decoded = keep * self._decode_s + seconds, keep * self._decoded + tokens

    def predict(self, queue: Iterable[Ticket], running: Sequence[Ticket], ask: Ask, slots: int) -> Prediction:
        """From now to its first token.

        Args:
            queue: those that will be dispatched before it.
            running: those dispatched.
            ask: the request.
            slots: as many as its class may use.
        """
        ahead = [ticket.ask for ticket in queue]
        missing = ask.choices + sum(each.choices for each in ahead) + sum(each.ask.choices for each in running) - slots
        start_s, token_s = self._prefill.fitted()
        before_s = token_s * (to_prefill(running) + sum(each.prompt_tokens for each in ahead))
        own_s = max(1e-6, start_s + token_s * ask.prompt_tokens)
        waits = missing > 0 and bool(running)
        likely, late = self._tokens_until(missing, running, [*ahead, ask]) if waits else (0.0, 0.0)
        pace_s = self._decode_s / self._decoded if self._decoded else _DECODE_S_PER_TOKEN
        raw_s = max(likely * pace_s, before_s) + own_s, max(late * pace_s, before_s) + own_s
        return self._corrected(raw_s, waits, guessed=not self._prefill.fits or (waits and not self._decoded))

    def observe(self, prediction: Prediction, real_s: float) -> None:
        """The first token of a request that was served came so long after that prediction was made."""
        if not real_s > 0:
            return
        if not prediction.guessed:  # how wrong a guess was says nothing of what is fitted
            regime = self._regimes[prediction.waits]
            regime.p50.observe(prediction.raw_s[0], prediction.p50_s, real_s)
            regime.q90.observe(prediction.raw_s[1], prediction.q90_s, real_s)
        self._within.append((real_s <= prediction.p50_s, real_s <= prediction.q90_s))
        self._observed += 1
        self._unchecked, self._checked_at = 0, self._clock()

    def calibration(self) -> Calibration:
        """Whether promises are what they say."""
        count = len(self._within)
        shares = [sum(each[at] for each in self._within) / count if count else None for at in (0, 1)]
        return Calibration(self._observed, *shares)

    def _corrected(self, raw_s: tuple[float, float], waits: bool, *, guessed: bool) -> Prediction:
        regime = self._regimes[waits]
        self._unchecked += 1
        idle_s = self._clock() - self._checked_at - _UNCHECKED_S
        share = 0.5 ** (idle_s / _UNCHECKED_S) if idle_s > 0 and self._unchecked > _UNCHECKED else 1.0
        p50_s, q90_s = (share * held.corrected(raw) for held, raw in zip((regime.p50, regime.q90), raw_s, strict=True))
        return Prediction(p50_s, max(p50_s, q90_s), waits, raw_s, guessed)

    def _tokens_until(self, missing: int, running: Sequence[Ticket], next_ones: Sequence[Ask]) -> tuple[float, float]:
        """How many tokens each answer gets until so many have ended: as expected, and in 9 of 10 cases.

        Whoever takes the place of one that has ended counts as a renewal process: the mean of what ends is the time
        over the mean length, its variance the squared coefficient of variation times that.
        """
        sample = [self._life(ticket) for ticket in running[:: -(-len(running) // _SAMPLED)]]
        share = sum(ticket.ask.choices for ticket in running) / sum(life.choices for life in sample)
        mean, variation = self._mean_of(next_ones)
        points = [(0.0, 0.0, 0.0)]  # tokens, answers ended as expected, and surely
        tokens, ended, replaced = max(1.0, mean * missing / len(running) / 8), 0.0, 0.0
        while points[-1][2] < missing and len(points) < _STEPS:
            before = ended
            ended, spread = (share * each for each in _ended(sample, tokens))
            replaced += (before + ended) / 2 * (tokens - points[-1][0]) / mean
            expected = ended + replaced
            points.append((tokens, expected, expected - _Z90 * math.sqrt(spread + variation * replaced)))
            tokens *= _STEP_GROWS
        return _reaches(missing, points, 1), _reaches(missing, points, 2)

    def _mean_of(self, asks: Sequence[Ask]) -> tuple[float, float]:
        """The mean length of their answers, and its squared coefficient of variation."""
        weights: Counter[QosClass] = Counter()
        for ask in asks:
            weights[ask.qos_class] += ask.choices
        total = sum(weights.values())
        moments = [(weight / total, *self._lengths.moments(each)) for each, weight in weights.items() if weight]
        mean = sum(weight * first for weight, first, _ in moments)
        return mean, sum(weight * second for weight, _, second in moments) / mean**2 - 1

    def _life(self, ticket: Ticket) -> _Life:
        ask = ticket.ask
        age = ticket.delivered / ask.choices
        at_most = math.inf if ask.max_tokens is None else ask.max_tokens - age
        return _Life(ask.choices, at_most, self._lengths.ending(ask.qos_class, age))


class _Life(NamedTuple):
    """Of one that runs: its answers, how many tokens each may get yet, and how probably it gets no more than some."""

    choices: int
    at_most: float
    ending: Callable[[float], float]


def _ended(running: Iterable[_Life], tokens: float) -> tuple[float, float]:
    """How many answers end within so many tokens more: the mean and the variance."""
    mean = variance = 0.0
    for choices, at_most, ending in running:
        chance = 1.0 if tokens >= at_most else ending(tokens)
        mean += choices * chance
        variance += choices * chance * (1 - chance)
    return mean, variance


def to_prefill(running: Iterable[Ticket]) -> int:
    """Prompt tokens of those dispatched that have no first token yet."""
    return sum(uncached(ticket) for ticket in running if ticket.first_token_s is None)


def uncached(ticket: Ticket) -> int:
    """Prompt tokens that had, or have, to be computed: as the engine counted them, before that as estimated."""
    return max(0, ticket.prompt_tokens - ticket.cached_tokens) if ticket.prompt_tokens else ticket.ask.prompt_tokens


def _reaches(wanted: float, points: Sequence[tuple[float, float, float]], column: Literal[1, 2]) -> float:
    """Where that column of the points reaches what is wanted, linear between two."""
    for before, after in pairwise(points):
        if after[column] >= wanted:
            low = max(0.0, before[column])
            return before[0] + (after[0] - before[0]) * (wanted - low) / (after[column] - low)
    return points[-1][0]
