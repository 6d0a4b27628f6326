"""The embedded model `fast`: what is in the package, and how its score is read.

`fast.npz` holds the weights (two blocks of signed bytes), `fast.json` the card: scales, calibration, thresholds, where
they come from. Both are written by `make train-injection`; the weights are checked against the card's digest.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import zipfile
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from aim_guardrail.detectors.injection.linear import Linear, Worst
from aim_guardrail.detectors.injection.ngrams import BUCKETS
from aim_guardrail.detectors.injection.normalise import copies, original

UNSUSPECTED = 0.05
"""Below this score nobody asks where in a text it is from."""
_BLOCKS = ("chars", "words")


class ModelError(Exception):
    """The model's files are missing, damaged or do not belong together. One line, with the remedy."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Thresholds(_Frozen):
    """Scores, 0..1, from which a text is flagged and from which it is blocked."""

    flag: float = Field(gt=0, lt=1)
    block: float = Field(gt=0, lt=1)


class Card(_Frozen):
    """What a model's numbers mean. `direct` is for what users write, `indirect` for what tools and documents say."""

    name: str
    version: int
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    slope: float = Field(gt=0)
    intercept: float
    direct: Thresholds
    indirect: Thresholds
    training: dict[str, int | float | str]

    def calibrated(self, logit: float) -> float:
        """The logit whose logistic is a probability on balanced validation data."""
        return self.slope * logit + self.intercept


class FastCard(Card):
    """The linear model's. `sha256` is of its weights."""

    char_scale: float = Field(gt=0)
    word_scale: float = Field(gt=0)
    bias: float


class BaseCard(_Frozen):
    """The package whose file the encoder's other layers stand in."""

    package: str
    version: str
    module: str
    file: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class StrongCard(Card):
    """Both models' together; `sha256`, `slope` and `intercept` are the encoder's.

    Attributes:
        gate: the linear model's logit below which a cascade does not ask the encoder; 5 % of validation attacks are.
    """

    base: BaseCard
    gate: float


class Judged(NamedTuple):
    """A text's score, and the code points of its worst window; of all of it, where a decoded copy is what is worst."""

    score: float
    start: int
    end: int


class Injection:
    """Says how likely a text tries to make a model leave its instructions: overrides, jailbreak personas, extraction of
    the system prompt, false roles, instructions planted in documents, and encoded versions of these. A harmful request
    without any of that is no injection, and a bare task in a document bears no sign that could be found.

    `score` returns 0..1: the probability on balanced validation data, not the share of such texts in your traffic.
    Compare it with `card.direct` or `card.indirect`, by where the text is from. It is the highest score of the whole
    text, of every window of 200 characters, and of those of the text's decoded copies, so the place of an attack in a
    long text does not matter. Synchronous, thread-safe and linear in the text; about 0.5 ms of CPU at 500 characters:
    a long text belongs off the event loop.
    """

    def __init__(self, linear: Linear, card: FastCard) -> None:
        self.linear = linear
        self.card = card

    def score(self, text: str) -> float:
        """0..1, higher is worse; any string, never an error. Empty text scores next to nothing."""
        return self.judge(text).score

    def logit(self, text: str) -> float:
        """The same before calibration, for a cascade."""
        return max(map(self.linear.logit, copies(text)))

    def judge(self, text: str, deadline_s: float = math.inf) -> Judged:
        """The score, and of which part. Raises TimeoutError once `time.monotonic` passes the deadline."""
        spelt = copies(text)
        found = [self.linear.worst(copy, deadline_s) for copy in spelt]
        return judged(text, spelt[0], found, self.card.calibrated(max(found).logit))

    glance = judge


def judged(text: str, plain: str, found: Sequence[Worst], logit: float) -> Judged:
    """The score that a calibrated logit is, and where it is from: `found` are the worst of each copy, that of `plain`,
    the text's normal form, first. Where a decoded copy is what is worst, or nothing is, the whole text is meant.
    """
    score = 1.0 / (1.0 + math.exp(-logit))
    if score < UNSUSPECTED or found[0] < max(found):
        return Judged(score, 0, len(text))
    return Judged(score, *original(text, plain, found[0].start, found[0].end))


@functools.cache
def embedded() -> Injection:
    """The model of this package, read once (2 ms). Raises ModelError."""
    return read(resources.files("aim_guardrail.detectors.injection"))


def read(folder: Traversable) -> Injection:
    """The model in a folder. Raises ModelError."""
    try:
        card = FastCard.model_validate_json((folder / "fast.json").read_bytes())
        blocks = np.load(io.BytesIO((folder / "fast.npz").read_bytes()), allow_pickle=False)
        chars, words = (_block(blocks[name]) for name in _BLOCKS)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"injection model {folder}: {reason}; install the package anew") from None
    if digest(chars, words) != card.sha256:
        raise ModelError(f"injection model {folder}/fast.npz: not the weights of fast.json; install the package anew")
    return Injection(Linear(chars, words, card.char_scale, card.word_scale, card.bias), card)


def digest(chars: NDArray[np.int8], words: NDArray[np.int8]) -> str:
    """SHA-256 of the weights, whatever file holds them."""
    return hashlib.sha256(chars.tobytes() + words.tobytes()).hexdigest()


def _block(weights: NDArray[np.int8]) -> NDArray[np.int8]:
    if weights.dtype != np.int8 or weights.shape != (BUCKETS,):
        raise ValueError(f"weights of type {weights.dtype} and shape {weights.shape}, not int8 and ({BUCKETS},)")
    return weights
