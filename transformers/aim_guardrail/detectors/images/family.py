"""The family `nsfw_image`: pictures, by a model that options name. Cheap to import."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aim_guardrail.detectors.base import BatchDetector, Label
from aim_guardrail.detectors.classifiers.options import Renamed
from aim_guardrail.detectors.family import Family, Options, Wanted

LABELS = {"NSFW": Label(threshold=0.5, top_score=1)}
#: What other models of the same kind call it (GantMan's five classes among them).
ALIASES = dict.fromkeys(["PORN", "HENTAI", "SEXY", "EXPLICIT", "UNSAFE"], "NSFW")


class ImageOptions(Options):
    """Which model judges, and how large a picture may be.

    Attributes:
        path: a Hugging Face directory with `config.json`, `preprocessor_config.json` and `model.onnx`.
        labels: the model's labels that mean one of the family's under another name.
        activation: what turns its outputs into scores, where its `config.json` says it wrong or not at all.
        threads: how many pictures are judged at once, by default one for each CPU, four at most.
        max_bytes, max_pixels: of a picture, all its frames together; a larger one counts as found.
    """

    path: str = Field(min_length=1)
    labels: Renamed = ()
    activation: Literal["softmax", "sigmoid"] | None = None
    threads: int | None = Field(default=None, ge=1, le=64)
    max_bytes: int = Field(default=10 * 2**20, ge=1024, le=2**30)
    max_pixels: int = Field(default=20_000_000, ge=1024, le=89_000_000)


def _build(wanted: Wanted) -> BatchDetector:
    from aim_guardrail.detectors.images.detector import ImageDetector

    assert isinstance(wanted.options, ImageOptions)
    return ImageDetector.read(wanted.options)


FAMILY = Family("nsfw_image", "batch", LABELS, _build, ImageOptions, reads="picture")
