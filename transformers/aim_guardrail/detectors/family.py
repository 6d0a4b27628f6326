"""What a family is: its labels, its options, and how its detector is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from aim_guardrail.detectors.base import Label


class Options(BaseModel):
    """What a rule's `options` may hold; this one: nothing. A family's own extends it. Unknown keys are errors,
    and lists become the tuples that can be hashed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _hashable(cls, data: Any) -> Any:
        return {key: as_tuple(value) for key, value in data.items()} if isinstance(data, dict) else data


def as_tuple(value: Any) -> Any:
    """YAML has lists; what is hashed has tuples. For validators, `mode="before"`."""
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a rule wants of its family's detector.

    Attributes:
        regions: whose national telephone numbers are looked for; None: every region's. PII only.
    """

    labels: frozenset[str]
    options: Options = field(default_factory=Options)
    regions: frozenset[str] | None = None


Kind = Literal["inline", "batch", "traffic"]
Reads = Literal["text", "picture"]


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        kind: `inline`: it makes a `Detector`; `batch`: a `BatchDetector`; `traffic`: none, for it reads no text.
        labels: what it can find, with default thresholds; of options that add labels, see `labels_of`.
        build: makes its detector; blocking, from any thread. Raises whatever keeps the detector from loading.
        options: what a rule's `options` may hold.
        named: the labels that options add.
        reads: what its detector judges: texts, or pictures (data URIs or Base64).
        usual: what a rule that names no entities looks for beside those that options add; None: all.
    """

    name: str
    kind: Kind
    labels: Mapping[str, Label]
    build: Callable[[Wanted], Any]
    options: type[Options] = Options
    named: Callable[[Any], Mapping[str, Label]] | None = field(default=None)
    usual: frozenset[str] | None = None
    reads: Reads = "text"

    def labels_of(self, options: Options) -> Mapping[str, Label]:
        """All labels a rule with these options can name."""
        return self.labels if self.named is None else {**self.labels, **self.named(options)}

    def usual_labels(self, options: Options) -> Mapping[str, Label]:
        """Those of them that a rule looks for which names none."""
        known = self.labels_of(options)
        rare = frozenset[str]() if self.usual is None else self.labels.keys() - self.usual
        return {name: label for name, label in known.items() if name not in rare}
