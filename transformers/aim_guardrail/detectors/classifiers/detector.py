"""A family's batch detector over a text classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from aim_guardrail.detectors.base import Asked, Finding, Passage
from aim_guardrail.detectors.classifiers.options import ClassifierOptions, family_labels
from aim_guardrail.detectors.onnx import ModelError, Score, TextClassifier


class Classifier(Protocol):
    """What says of a text how much each of its labels applies."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All it has."""

    @property
    def digest(self) -> str:
        """Changes whenever what it says may."""

    async def classify(self, texts: Sequence[str], deadline_s: float) -> list[list[Score]]:
        """Of each text every label's score; none of a text that says nothing to it."""

    async def close(self) -> None:
        """Give back what it holds."""


class ClassifierDetector:
    """Findings of one family: of each passage the best window of every label, whatever its score."""

    def __init__(
        self, family: str, cost: Literal["model", "remote"], classifier: Classifier, meanings: Mapping[str, str]
    ) -> None:
        """``meanings``: of the classifier's labels those that mean one of the family's."""
        self.family = family
        self.cacheable = True
        self.cost: Literal["model", "remote"] = cost
        self._classifier = classifier
        self._meanings = dict(meanings)
        known = f"{family} {classifier.digest} {sorted(meanings.items())}"
        self.digest = hashlib.sha256(known.encode()).hexdigest()

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        """As `BatchDetector` says. Raises what the classifier raises."""
        found = await self._classifier.classify([passage.text for passage in passages], asked.deadline_s)
        return [list(self._findings(scores)) for scores in found]

    async def close(self) -> None:
        """Give back what the classifier holds."""
        await self._classifier.close()

    def _findings(self, scores: Iterable[Score]) -> Iterable[Finding]:
        best: dict[str, Score] = {}
        for score in scores:
            label = self._meanings.get(score.label)
            if label is not None and (label not in best or score.score > best[label].score):
                best[label] = score
        for label, score in best.items():
            yield Finding(self.family, label, score.start, score.end, score.score, f"{self.family}.{score.label}")


def build(
    family: str,
    known: Mapping[str, object],
    wanted: frozenset[str],
    options: ClassifierOptions,
    aliases: Mapping[str, str],
) -> ClassifierDetector:
    """The detector of a model that options name. Blocking.

    Raises:
        ModelError: the directory cannot be used, or the model cannot find what the policy looks for.
    """
    classifier: Classifier
    cost: Literal["model", "remote"]
    if options.endpoint is not None:
        from aim_guardrail.detectors.classifiers.served import ServedClassifier

        classifier, cost = ServedClassifier(options), "remote"
    else:
        assert options.path is not None
        classifier, cost = TextClassifier.read(Path(options.path), options.activation, options.threads), "model"
    try:
        meanings = family_labels(classifier.labels, known, options.labels, aliases)
    except ValueError as error:
        raise ModelError(f"{options.path or options.endpoint}: {error}") from None
    missing = sorted(wanted - set(meanings.values()))
    if missing:
        raise ModelError(
            f"{options.path or options.endpoint}: nothing among its labels ({', '.join(classifier.labels)}) "
            f"means {', '.join(missing)}: say which does with options.labels, or name the entities it has"
        )
    return ClassifierDetector(family, cost, classifier, meanings)
