"""The family `toxicity`: labels, options, and how its detector is made. Cheap to import."""

from __future__ import annotations

from aim_guardrail.detectors.base import BatchDetector, Label
from aim_guardrail.detectors.classifiers.options import ClassifierOptions
from aim_guardrail.detectors.family import Family, Wanted

TOXICITY_LABELS = {
    "TOXIC": Label(threshold=0.9, top_score=1),
    "SEVERE_TOXIC": Label(threshold=0.2, top_score=1),
    "OBSCENE": Label(threshold=0.6, top_score=1),
    "THREAT": Label(threshold=0.08, top_score=1),
    "INSULT": Label(threshold=0.5, top_score=1),
    "IDENTITY_HATE": Label(threshold=0.2, top_score=1),
}
"""Thresholds are the embedded model's, which is seldom sure of the rare labels (docs/toxicity-model.md). Another model
wants its own."""

#: What other models of the same labels call them.
ALIASES = {
    "TOXICITY": "TOXIC",
    "SEVERE_TOXICITY": "SEVERE_TOXIC",
    "IDENTITY_ATTACK": "IDENTITY_HATE",
}


def _build(wanted: Wanted) -> BatchDetector:
    from aim_guardrail.detectors.classifiers.detector import ClassifierDetector, build

    options = wanted.options
    assert isinstance(options, ClassifierOptions)
    if options.is_given:
        return build("toxicity", TOXICITY_LABELS, wanted.labels, options, ALIASES)
    from aim_guardrail.detectors.toxicity.model import embedded

    classifier = embedded()
    return ClassifierDetector("toxicity", "model", classifier, {label: label for label in classifier.labels})


FAMILY = Family("toxicity", "batch", TOXICITY_LABELS, _build, ClassifierOptions)
