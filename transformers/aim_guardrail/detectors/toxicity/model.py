"""The embedded model: files of the package, made by `make convert-toxicity`, checked against the card's digests."""

from __future__ import annotations

import hashlib
from importlib import resources
from importlib.resources.abc import Traversable

from pydantic import BaseModel, ConfigDict, ValidationError

from aim_guardrail.detectors.onnx import ModelError, TextClassifier
from aim_guardrail.detectors.onnx.graph import Graph
from aim_guardrail.detectors.toxicity.words import WordWindows


class Card(BaseModel):
    """`jigsaw.json`: which files it is of, by SHA-256; the labels of the outputs, in their order; where it is from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: str
    licence: str
    labels: tuple[str, ...]
    sha256: dict[str, str]


def embedded() -> TextClassifier:
    """The model of this package, with threads of its own. Blocking (some 20 ms). Raises ModelError."""
    return read(resources.files("aim_guardrail.detectors.toxicity"))


def read(folder: Traversable) -> TextClassifier:
    """The model in a folder. Raises ModelError."""
    try:
        card = Card.model_validate_json((folder / "jigsaw.json").read_bytes())
        files = {name: (folder / name).read_bytes() for name in ("jigsaw.onnx", "jigsaw.txt")}
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"toxicity model {folder}: {reason}; install the package anew") from None
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != card.sha256.get(name):
            raise ModelError(f"toxicity model {folder}/{name}: not the file of jigsaw.json; install the package anew")
    windower = WordWindows(files["jigsaw.txt"].decode().split("\n")[:-1])
    digest = hashlib.sha256(repr(sorted(card.sha256.items())).encode()).hexdigest()
    return TextClassifier(Graph(files["jigsaw.onnx"]), windower, card.labels, "sigmoid", digest)
