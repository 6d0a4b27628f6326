"""The families: what a policy's `type` can be, each with its labels, its options and how its detector is made.

A family's own module holds its `FAMILY`, and is cheap to import: engines load when a detector is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from aim_guardrail.detectors.base import BatchDetector, Detector, Label
from aim_guardrail.detectors.code.labels import CODE_LABELS
from aim_guardrail.detectors.pii_labels import PII_LABELS


class Options(BaseModel):
    """What a rule's `options` may hold; this one: nothing. A family's own extends it. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a rule wants of its family's detector.

    Attributes:
        regions: whose national telephone numbers are looked for; None: every region's. PII only.
    """

    labels: frozenset[str]
    options: Options = field(default_factory=Options)
    regions: frozenset[str] | None = None


Kind = Literal["inline", "batch"]


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        kind: `inline`: it makes a `Detector`; `batch`: a `BatchDetector`.
        labels: what it can find, with default thresholds; of options that add labels, see `labels_of`.
        build: makes its detector; blocking, from any thread. Raises whatever keeps the detector from loading.
        options: what a rule's `options` may hold.
        named: the labels that options add.
    """

    name: str
    kind: Kind
    labels: Mapping[str, Label]
    build: Callable[[Wanted], Any]
    options: type[Options] = Options
    named: Callable[[Any], Mapping[str, Label]] | None = field(default=None)

    def labels_of(self, options: Options) -> Mapping[str, Label]:
        """All labels a rule with these options can name."""
        return self.labels if self.named is None else {**self.labels, **self.named(options)}


def _secrets(wanted: Wanted) -> Detector:
    from aim_guardrail.detectors.secrets import SecretDetector

    return SecretDetector()


def _pii(wanted: Wanted) -> Detector:
    from aim_guardrail.detectors.pii import PiiDetector

    return PiiDetector(wanted.labels, wanted.regions)


def _code(wanted: Wanted) -> Detector:
    from aim_guardrail.detectors.code.detector import CodeDetector

    return CodeDetector(wanted.labels)


_OURS = (
    # The scanner's own words are "high", "medium" and "low" confidence; they count as 0.9, 0.6 and 0.3 here.
    Family("secrets", "inline", {"SECRET": Label(threshold=0.5, top_score=0.9)}, _secrets),
    Family("pii", "inline", PII_LABELS, _pii),
    Family("code", "inline", CODE_LABELS, _code),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _OURS}
"""Every family a policy can name. Their order is their precedence where spans overlap."""


def build_detector(family: str, wanted: Wanted) -> Detector | BatchDetector:
    """The detector of a family, its engine loaded. Blocking; safe to call from any thread."""
    made: Detector | BatchDetector = FAMILIES[family].build(wanted)
    return made
