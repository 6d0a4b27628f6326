"""The family's detectors: the embedded models, and a classifier in a Hugging Face directory."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from aim_guardrail.detectors.base import Asked, Finding, Passage
from aim_guardrail.detectors.injection.family import DIRECT, INDIRECT, Embedded
from aim_guardrail.detectors.injection.model import Injection, Judged, embedded
from aim_guardrail.detectors.onnx import ModelError, TextClassifier
from aim_guardrail.detectors.threads import Threads

FAMILY_NAME = "injection"
INLINE_CHARS = 1_000  # judged on the event loop: a millisecond, less than a thread's turn costs when all are busy
_HARMLESS = frozenset({"safe", "benign", "legit", "legitimate", "harmless", "normal", "label_0"})


class EmbeddedDetector:
    """Judges by the models of the package. Long texts are judged in a thread, one after another, until the deadline."""

    family = FAMILY_NAME
    cost: Literal["model", "remote"] = "model"
    cacheable = True

    def __init__(self, name: Embedded, fast: Injection) -> None:
        self.digest = f"{name} {fast.card.sha256}"
        self._rule_id = f"injection-{name}"
        self._fast = fast
        self._threads = Threads(min(4, os.cpu_count() or 1), "injection")

    @classmethod
    def load(cls, name: Embedded) -> EmbeddedDetector:
        """Blocking. Raises ModelError."""
        return cls(name, embedded())

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        """One finding of each passage, whatever its score."""
        if sum(len(passage.text) for passage in passages) <= INLINE_CHARS:
            judged = self._judged(passages)
        else:
            judged = await self._threads.run(self._judged, passages, asked.deadline_s)
        return [[self._finding(*pair)] for pair in zip(passages, judged, strict=True)]

    async def close(self) -> None:
        """Give back its threads."""
        self._threads.close()

    def _judged(self, passages: Sequence[Passage], deadline_s: float = math.inf) -> list[Judged]:
        return [self._fast.judge(passage.text, deadline_s) for passage in passages]

    def _finding(self, passage: Passage, judged: Judged) -> Finding:
        return finding(passage, judged.start, judged.end, judged.score, self._rule_id)


class Classified:
    """Judges by a sequence classifier in ONNX Runtime, such as `protectai/deberta-v3-base-prompt-injection-v2` or
    `meta-llama/Llama-Prompt-Guard-2-86M`.
    """

    family = FAMILY_NAME
    cost: Literal["model", "remote"] = "model"
    cacheable = True

    def __init__(self, classifier: TextClassifier, attacks: Sequence[str]) -> None:
        self.digest = f"{classifier.digest} {' '.join(attacks)}"
        self._classifier = classifier
        self._attacks = frozenset(attacks)

    @classmethod
    def read(cls, path: Path, attacks: Sequence[str] | None) -> Classified:
        """Blocking. Raises ModelError."""
        classifier = TextClassifier.read(path)
        return cls(classifier, _attack_labels(path, classifier.labels, attacks))

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        """Of each passage the window that looks most like an attack; none of one that holds no token."""
        texts = [passage.text for passage in passages]
        found = []
        for passage, scores in zip(passages, await self._classifier.classify(texts, asked.deadline_s), strict=True):
            attacks = [each for each in scores if each.label in self._attacks]
            worst = max(attacks, key=lambda each: each.score, default=None)
            found.append([] if worst is None else [finding(passage, worst.start, worst.end, worst.score, worst.label)])
        return found

    async def close(self) -> None:
        """Give back its threads."""
        await self._classifier.close()


def finding(passage: Passage, start: int, end: int, score: float, rule_id: str) -> Finding:
    """What was found, by where the text is from."""
    return Finding(FAMILY_NAME, INDIRECT if passage.is_indirect else DIRECT, start, end, score, rule_id)


def _attack_labels(path: Path, labels: Sequence[str], named: Sequence[str] | None) -> Sequence[str]:
    """Those named, or all but what stands for harmless. Raises ModelError."""
    known = ", ".join(labels)
    for label in named or ():
        if label not in labels:
            raise ModelError(f"{path}: attack_labels: the model has no label {label!r}: use some of {known}")
    if named is None and not any(label.lower() in _HARMLESS for label in labels):
        raise ModelError(f"{path}: which of {known} mean an attack? name them in attack_labels")
    return named or [label for label in labels if label.lower() not in _HARMLESS]
