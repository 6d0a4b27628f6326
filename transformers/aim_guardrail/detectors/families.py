"""The families: what a policy's `type` can be, each with its labels, its options and how its detector is made.

A family's own module holds its `FAMILY` (see `family`), and is cheap to import: engines load when a detector is built.
"""

from __future__ import annotations

from aim_guardrail.detectors.base import BatchDetector, Detector, Label
from aim_guardrail.detectors.classifiers.nsfw_text import FAMILY as NSFW_TEXT
from aim_guardrail.detectors.code.labels import CODE_LABELS
from aim_guardrail.detectors.family import Family, Kind, Options, Wanted
from aim_guardrail.detectors.images.family import FAMILY as NSFW_IMAGE
from aim_guardrail.detectors.injection.family import FAMILY as INJECTION
from aim_guardrail.detectors.installed import installed
from aim_guardrail.detectors.judge.family import COMPLIANCE, SAFETY
from aim_guardrail.detectors.ner.family import FAMILY as NER
from aim_guardrail.detectors.pii_labels import IDENTIFIER_LABELS, PII_LABELS
from aim_guardrail.detectors.pii_options import PiiOptions
from aim_guardrail.detectors.toxicity.family import FAMILY as TOXICITY
from aim_guardrail.detectors.traffic import FAMILY as TRAFFIC

__all__ = ["FAMILIES", "UNUSABLE", "Family", "Kind", "Options", "Wanted", "build_detector"]


def _secrets(wanted: Wanted) -> Detector:
    from aim_guardrail.detectors.secrets import SecretDetector

    return SecretDetector()


def _pii(wanted: Wanted) -> Detector:
    from aim_guardrail.detectors.pii import PiiDetector

    options = wanted.options if isinstance(wanted.options, PiiOptions) else None
    return PiiDetector(wanted.labels, wanted.regions, options)


def _code(wanted: Wanted) -> Detector:
    from aim_guardrail.detectors.code.detector import CodeDetector

    return CodeDetector(wanted.labels)


_OURS = (
    # The scanner's own words are "high", "medium" and "low" confidence; they count as 0.9, 0.6 and 0.3 here.
    Family("secrets", "inline", {"SECRET": Label(threshold=0.5, top_score=0.9)}, _secrets),
    Family(
        "pii",
        "inline",
        {**PII_LABELS, **IDENTIFIER_LABELS},
        _pii,
        PiiOptions,
        lambda options: options.labels,
        usual=frozenset(PII_LABELS),
    ),
    Family("code", "inline", CODE_LABELS, _code),
    INJECTION,
    TOXICITY,
    NSFW_TEXT,
    SAFETY,
    COMPLIANCE,
    TRAFFIC,
    NSFW_IMAGE,
    NER,
)

FAMILIES: dict[str, Family] = {family.name: family for family in _OURS}
"""Every family a policy can name: ours, then those of installed distributions. Their order is their precedence where
spans overlap."""

_THEIRS, UNUSABLE = installed(FAMILIES)
FAMILIES |= _THEIRS


def build_detector(family: str, wanted: Wanted) -> Detector | BatchDetector:
    """The detector of a family, its engine loaded. Blocking; safe to call from any thread."""
    made: Detector | BatchDetector = FAMILIES[family].build(wanted)
    return made
