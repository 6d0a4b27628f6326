"""Calibration and thresholds, on validation texts only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aim_guardrail.detectors.injection.model import Thresholds

if TYPE_CHECKING:
    from injection_training.corpora import Example

Floats = NDArray[np.float64]

DIRECT = frozenset({"slabs", "neuralchemy", "chat", "instructions", "prompts"})
INDIRECT = frozenset({"documents", "long documents", "prompts"})
#: Shares of harmless validation texts that may be found wrongly, the kinds weighing the same.
_FLAG, _BLOCK = 0.005, 0.001
_DIGITS = 6


def platt(logits: Mapping[Example, float]) -> tuple[float, float]:
    """Slope and intercept that make the logits probabilities, both classes weighing the same; Newton's method.

    J. Platt, Probabilistic outputs for support vector machines, 1999.
    """
    attacks, benign = (_values(logits, attack) for attack in (True, False))
    z = np.concatenate((attacks, benign))
    label = np.repeat([1.0, 0.0], [len(attacks), len(benign)])
    weight = np.repeat([0.5 / len(attacks), 0.5 / len(benign)], [len(attacks), len(benign)])
    design = np.stack((z, np.ones_like(z)))
    found = np.array([1.0, 0.0])
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-found @ design))
        step = np.linalg.solve((design * (weight * p * (1 - p))) @ design.T, design @ (weight * (p - label)))
        found = found - step
    return round(float(found[0]), _DIGITS), round(float(found[1]), _DIGITS)


def thresholds(calibrated: Mapping[Example, float], kinds: Iterable[str]) -> Thresholds:
    """Scores from which 0.5 %, and 0.1 %, of harmless texts of these kinds are found (each kind weighs the same)."""
    groups = [
        np.array([logit for each, logit in calibrated.items() if each.kind == kind and not each.attack])
        for kind in sorted(kinds)
    ]
    flag, block = (round(1 / (1 + math.exp(-_cut(groups, share))), _DIGITS) for share in (_FLAG, _BLOCK))
    return Thresholds(flag=flag, block=block)


def lowest(logits: Mapping[Example, float], share: float) -> float:
    """The logit below which this share of the attacks lies."""
    return round(float(np.quantile(_values(logits, True), share)), _DIGITS)


def _values(logits: Mapping[Example, float], attack: bool) -> Floats:
    return np.array([logit for example, logit in logits.items() if example.attack is attack])


def _cut(groups: Sequence[Floats], share: float) -> float:
    """The lowest logit above which at most this share lies, averaged over the groups."""
    logits = np.concatenate(groups)
    weights = np.concatenate([np.full(len(group), 1 / len(group) / len(groups)) for group in groups])
    order = np.argsort(-logits, kind="stable")
    return float(logits[order][np.searchsorted(np.cumsum(weights[order]), share)])
