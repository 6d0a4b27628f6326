"""The family `injection`: prompt injection and jailbreaks. Cheap to import; `detector` is what judges."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from aim_guardrail.detectors.base import BatchDetector, Label
from aim_guardrail.detectors.family import Family, Options, Wanted

DIRECT, INDIRECT = "INJECTION", "INJECTION_INDIRECT"
"""What whoever asks has written, and what a tool, a function or a document says."""

Embedded = Literal["fast"]


class InjectionOptions(Options):
    """Which model judges: one in the package, or a Hugging Face directory.

    Attributes:
        model: an embedded one; the best there is by default.
        path: a sequence classifier's directory, in place of an embedded model.
        attack_labels: those of its labels that mean an attack; by default all but what stands for harmless.
    """

    model: Embedded | None = None
    path: str | None = Field(default=None, min_length=1)
    attack_labels: tuple[str, ...] | None = Field(default=None, min_length=1)

    @field_validator("attack_labels", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _is_one(self) -> InjectionOptions:
        if self.model is not None and self.path is not None:
            raise ValueError("model names an embedded model and path another: give one of them")
        if self.attack_labels is not None and self.path is None:
            raise ValueError("attack_labels are those of the model under path: give it, or remove them")
        return self

    @property
    def embedded(self) -> Embedded:
        """The embedded model that is meant."""
        return self.model or "fast"


@functools.cache
def thresholds(model: Embedded) -> Mapping[str, Label]:
    """The labels, with the scores at which 1 % of harmless validation texts is found wrongly."""
    card = json.loads((resources.files(__package__) / f"{model}.json").read_bytes())
    return {
        DIRECT: Label(threshold=card["direct"]["flag"], top_score=1.0),
        INDIRECT: Label(threshold=card["indirect"]["flag"], top_score=1.0),
    }


_OTHERS = {label: Label(threshold=0.5, top_score=1.0) for label in (DIRECT, INDIRECT)}


def _labels(options: InjectionOptions) -> Mapping[str, Label]:
    return thresholds(options.embedded) if options.path is None else _OTHERS


def _build(wanted: Wanted) -> BatchDetector:
    from aim_guardrail.detectors.injection.detector import Classified, EmbeddedDetector

    options = wanted.options
    assert isinstance(options, InjectionOptions)
    if options.path is None:
        return EmbeddedDetector.load(options.embedded)
    return Classified.read(Path(options.path), options.attack_labels)


FAMILY = Family("injection", "batch", thresholds("fast"), _build, InjectionOptions, _labels)
