"""The family `nsfw_text`: sexual content in texts, by a model that options name. Cheap to import.

None is embedded: of those inside packages none has both a licence and a worth.
"""

from __future__ import annotations

from aim_guardrail.detectors.base import BatchDetector, Label
from aim_guardrail.detectors.classifiers.options import ModelOptions
from aim_guardrail.detectors.family import Family, Wanted

LABELS = {"NSFW": Label(threshold=0.5, top_score=1)}
ALIASES = dict.fromkeys(["SEXUAL", "SEXUAL_EXPLICIT", "SEXUALLY_EXPLICIT", "EXPLICIT", "PORN"], "NSFW")


def _build(wanted: Wanted) -> BatchDetector:
    from aim_guardrail.detectors.classifiers.detector import build

    assert isinstance(wanted.options, ModelOptions)
    return build("nsfw_text", LABELS, wanted.labels, wanted.options, ALIASES)


FAMILY = Family("nsfw_text", "batch", LABELS, _build, ModelOptions)
