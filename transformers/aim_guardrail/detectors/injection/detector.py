"""The family's detectors: the embedded models, and a classifier in a Hugging Face directory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Literal, Protocol

from aim_guardrail.detectors.base import Asked, Finding, Passage
from aim_guardrail.detectors.classifiers.detector import ClassifierDetector, build
from aim_guardrail.detectors.injection.family import ALIASES, DIRECT, INDIRECT, Embedded, InjectionOptions
from aim_guardrail.detectors.injection.model import Card, Judged, embedded
from aim_guardrail.detectors.injection.strong import strong
from aim_guardrail.detectors.threads import Threads

FAMILY_NAME = "injection"
INLINE_CHARS = 2_000  # judged on the event loop: some two milliseconds
TEXT_CHARS = 200  # what a text costs beside its characters, in characters


class Model(Protocol):
    """An embedded model."""

    @property
    def card(self) -> Card:
        """What its numbers mean."""

    def judge(self, text: str, deadline_s: float = ...) -> Judged:
        """The score; blocking. Raises TimeoutError."""

    def glance(self, text: str) -> Judged | None:
        """The score, where it costs no more than the linear model does."""


class EmbeddedDetector:
    """Judges by the models of the package. What takes long is judged in a thread, until the deadline."""

    family = FAMILY_NAME
    cost: Literal["model", "remote"] = "model"
    cacheable = True

    def __init__(self, name: Embedded, model: Model) -> None:
        self.digest = f"{name} {embedded().card.sha256} {model.card.sha256}"
        self._rule_id = f"injection-{name}"
        self._model = model
        self._threads = Threads(min(4, os.cpu_count() or 1), "injection")

    @classmethod
    def load(cls, name: Embedded) -> EmbeddedDetector:
        """Blocking. Raises ModelError."""
        return cls(name, embedded() if name == "fast" else strong(gated=name == "cascade"))

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        """One finding of each passage, whatever its score."""
        texts = [passage.text for passage in passages]
        found: list[Judged | None] = [None] * len(texts)
        if sum(len(text) + TEXT_CHARS for text in texts) <= INLINE_CHARS:
            found = [self._model.glance(text) for text in texts]
        left = [text for text, judged in zip(texts, found, strict=True) if judged is None]
        rest = iter(await self._threads.run(self._judged, left, asked.deadline_s) if left else ())
        judged = [each if each is not None else next(rest) for each in found]
        return [[self._finding(*pair)] for pair in zip(passages, judged, strict=True)]

    async def close(self) -> None:
        """Give back its threads."""
        self._threads.close()

    def _judged(self, texts: Sequence[str], deadline_s: float) -> list[Judged]:
        found = []
        for text in texts:
            if time.monotonic() > deadline_s:  # a text may be too short for a model to look at the clock
                raise TimeoutError("the texts could not be judged in time")
            found.append(self._model.judge(text, deadline_s))
        return found

    def _finding(self, passage: Passage, judged: Judged) -> Finding:
        where = judged.start, judged.end
        return Finding(FAMILY_NAME, label_of(passage), *where, judged.score, self._rule_id)


class Classified:
    """Judges by a text classifier of one's own, such as `protectai/deberta-v3-base-prompt-injection-v2` or
    `meta-llama/Llama-Prompt-Guard-2-86M`: of each passage the window that looks most like an attack.
    """

    family = FAMILY_NAME
    cacheable = True

    def __init__(self, detector: ClassifierDetector) -> None:
        self.cost = detector.cost
        self.digest = detector.digest
        self._detector = detector

    @classmethod
    def build(cls, options: InjectionOptions) -> Classified:
        """Of the model that options name. Blocking. Raises ModelError."""
        return cls(build(FAMILY_NAME, {DIRECT: None}, frozenset({DIRECT}), options, ALIASES))

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        """As `BatchDetector` says. Raises what the classifier raises."""
        found = await self._detector.scan_batch(passages, asked)
        return [
            [finding._replace(label=label_of(passage)) for finding in findings]
            for passage, findings in zip(passages, found, strict=True)
        ]

    async def close(self) -> None:
        """Give back its threads or connections."""
        await self._detector.close()


def label_of(passage: Passage) -> str:
    """By where the text is from."""
    return INDIRECT if passage.is_indirect else DIRECT
