"""AUC and rates, each with a 95 % interval."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
_Z = 1.959964
_RESAMPLES = 1000
_SEED = 0


class Figure(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f}-{self.high:.4f})"


def rate(hits: int, of: int) -> Figure:
    """A share, with Wilson's interval."""
    share, spread = hits / of, _Z**2 / of
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return Figure(share, max(centre - half, 0.0), min(centre + half, 1.0))


def auc(attacks: Scores, benign: Scores) -> Figure:
    """Area under the ROC curve, ties halved; the interval from 1,000 resamples of both sides, fixed seed."""
    random = np.random.default_rng(_SEED)
    again = [_auc(random.choice(attacks, len(attacks)), random.choice(benign, len(benign))) for _ in range(_RESAMPLES)]
    low, high = np.quantile(again, (0.025, 0.975))
    return Figure(_auc(attacks, benign), float(low), float(high))


def _auc(attacks: Scores, benign: Scores) -> float:
    ordered = np.sort(benign)
    below, upto = (np.searchsorted(ordered, attacks, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(benign))
