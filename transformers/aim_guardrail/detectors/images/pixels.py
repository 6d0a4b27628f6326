"""Pictures as a model reads them: decoded within bounds, scaled and normalised. The only file that imports Pillow."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, field_validator

from aim_guardrail.detectors.onnx.directory import ModelError, parsed

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
FRAMES = 8
"""Of a moving picture as many are looked at, evenly drawn, the first and the last among them."""

_DATA_URI = re.compile(r"\s*+data:[^,]{0,1000}+,", re.IGNORECASE)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

Pixels = NDArray[np.float32]


class Unreadable(ValueError):
    """No picture that can be judged; `reason` is one word of ours."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Preprocessor(BaseModel):
    """`preprocessor_config.json` as transformers' image processors write it: what matters here."""

    do_resize: bool = True
    size: dict[str, int] = {"height": 224, "width": 224}
    resample: int = 2
    do_center_crop: bool = False
    crop_size: dict[str, int] | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @field_validator("size", "crop_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return {"height": value, "width": value} if type(value) is int else value

    @classmethod
    def read(cls, folder: Path) -> Preprocessor:
        """A directory's. Raises ModelError."""
        made = parsed(folder / "preprocessor_config.json", cls)
        for name in ("size", "crop_size"):
            size = getattr(made, name)
            if size is not None and size.keys() not in ({"height", "width"}, {"shortest_edge"}):
                raise ModelError(f"{folder}/preprocessor_config.json: {name} needs height and width, or shortest_edge")
            if size is not None and not all(0 < each <= 4096 for each in size.values()):
                raise ModelError(f"{folder}/preprocessor_config.json: {name} is {size}: use 1 to 4096")
        return made

    def pixels(self, image: Image.Image) -> Pixels:
        """(3, height, width), as the model was trained on, of an RGB picture."""
        if self.do_resize:
            image = image.resize(_target(self.size, image), Image.Resampling(self.resample))
        if self.do_center_crop and self.crop_size is not None:
            image = _cropped(image, _target(self.crop_size, image))
        values = np.array(image, np.float32)
        if self.do_rescale:
            values *= np.float32(self.rescale_factor)
        if self.do_normalize:
            values -= np.array(self.image_mean, np.float32)
            values /= np.array(self.image_std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1), np.float32)


def blank() -> Image.Image:
    """A picture of nothing, to try a model with."""
    return Image.new("RGB", (224, 224))


def content(text: str, max_bytes: int) -> bytes:
    """What a data URI, or bare Base64, holds. Raises Unreadable."""
    start = _DATA_URI.match(text)
    size = len(text) - (start.end() if start else 0)
    if size * 3 // 4 > max_bytes:
        raise Unreadable("too_large")
    coded = "".join(text[start.end() if start else 0 :].split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(coded + "=" * (-len(coded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Unreadable("unreadable") from None


def frames(raw: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The frames of a picture that are looked at. Nothing is decoded before its size is known. Raises Unreadable."""
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            count = getattr(image, "n_frames", 1)
            _check_size(image, count, max_pixels)
            for at in sorted({round(step * (count - 1) / (FRAMES - 1)) for step in range(FRAMES)}):
                image.seek(at)
                _check_size(image, 1, max_pixels)  # a TIFF's pages have sizes of their own
                yield image.convert("RGB")
    except Unreadable:
        raise
    except _BOMBS:
        raise Unreadable("too_large") from None
    except Exception:  # noqa: BLE001 - Pillow's decoders raise whatever their format's reader meets
        raise Unreadable("unreadable") from None


def _check_size(image: Image.Image, count: int, max_pixels: int) -> None:
    if image.width * image.height * count > max_pixels:
        raise Unreadable("too_large")


def _target(size: dict[str, int], image: Image.Image) -> tuple[int, int]:
    """Width and height. Of the shortest edge, the other as it fits, four times as long at most."""
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    scale = size["shortest_edge"] / min(image.size)
    width, height = (max(1, min(round(each * scale), 4 * size["shortest_edge"])) for each in image.size)
    return width, height


def _cropped(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))
