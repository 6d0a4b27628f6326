"""Named entities by spaCy, in one thread of its own. The edge to spaCy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from aim_guardrail.detectors.base import Asked, Finding, Misconfigured, Passage
from aim_guardrail.detectors.ner.family import SCORE, NerOptions
from aim_guardrail.detectors.threads import Threads

_LABELS = {"PERSON": "PERSON", "GPE": "LOCATION", "LOC": "LOCATION", "FAC": "LOCATION", "ORG": "ORGANIZATION"}
# Taking no part in finding entities: a third of the time.
_UNUSED = ["parser", "tagger", "attribute_ruler", "lemmatizer"]
_WINDOW_CHARS = 4096
# What the small model takes for organizations: the names of numbers, formats and protocols.
_ABBREVIATIONS = """
    api bic card cpf csv dns email gdpr gpu html http https iban id ip json llm nhs nino pan pii pin sdk sql ssh ssl ssn
    swift tls url uuid vat xml yaml
"""
_NO_NAMES = frozenset(_ABBREVIATIONS.split())
_NAME = re.compile(r"[^\W\d_]{2}")


class NerDetector:
    """Finds the labels it is given. Loading blocks for a second or two.

    Raises:
        Misconfigured: spaCy or the model is not installed.
    """

    family = "ner"
    cost: Literal["model", "remote"] = "model"
    cacheable = True

    def __init__(self, labels: frozenset[str], options: NerOptions) -> None:
        self._labels = labels
        self._nlp = _load(options.model)
        meta = self._nlp.meta
        self.digest = f"{options.model} {meta.get('name')} {meta.get('version')} {','.join(sorted(labels))}"
        self._threads = Threads(1, "ner")

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        """The names in each passage."""
        return [await self._threads.run(self._names, passage.text) for passage in passages]

    async def close(self) -> None:
        """End the thread."""
        self._threads.close()

    def _names(self, text: str) -> list[Finding]:
        return [
            Finding("ner", label, start + entity.start_char, start + entity.end_char, SCORE, f"spacy.{entity.label_}")
            for start, end in _windows(text)
            for entity in self._nlp(text[start:end]).ents
            if (label := _LABELS.get(entity.label_)) in self._labels and label is not None and _is_name(entity.text)
        ]


def _is_name(text: str) -> bool:
    """No placeholder of ours, nor an abbreviation that the model takes for a name."""
    return _NAME.search(text) is not None and not set("<>_") & set(text) and text.casefold() not in _NO_NAMES


def _windows(text: str) -> Iterator[tuple[int, int]]:
    """The text in pieces that end behind whitespace, where there is any."""
    start = 0
    while start < len(text):
        end = min(start + _WINDOW_CHARS, len(text))
        if end < len(text) and (space := max(text.rfind(" ", start, end), text.rfind("\n", start, end))) > start:
            end = space + 1
        yield start, end
        start = end


def _load(model: str) -> Any:
    try:
        import spacy

        return spacy.load(model, disable=_UNUSED)
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Misconfigured(
            f"ner: spaCy's model {model!r} cannot be loaded ({reason}): install the extra 'ner', or name another under "
            "options.model"
        ) from None
