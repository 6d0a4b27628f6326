"""The batch detector over pictures: each frame through the model, the highest score of every label."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aim_guardrail.detectors.base import Asked, Finding, Passage
from aim_guardrail.detectors.classifiers.options import family_labels
from aim_guardrail.detectors.images.family import ALIASES, LABELS, ImageOptions
from aim_guardrail.detectors.images.pixels import Pixels, Preprocessor, Unreadable, blank, content, frames
from aim_guardrail.detectors.onnx import Batches, ModelError
from aim_guardrail.detectors.onnx.classifier import activated
from aim_guardrail.detectors.onnx.directory import Directory
from aim_guardrail.detectors.onnx.graph import Graph


class ImageDetector:
    """Findings of `nsfw_image`. A passage's text is the picture: a data URI, or Base64. What cannot be read, or is too
    large, counts as found: its rule id says so (`nsfw_image.unreadable`, `nsfw_image.too_large`).
    """

    family = "nsfw_image"
    cost: Literal["model", "remote"] = "model"
    cacheable = True

    def __init__(
        self, directory: Directory, graph: Graph, preprocessor: Preprocessor, options: ImageOptions, digest: str
    ) -> None:
        """Raises ModelError: the model's labels mean nothing here."""
        try:
            self._meanings: Mapping[str, str] = family_labels(directory.labels, LABELS, options.labels, ALIASES)
        except ValueError as error:
            raise ModelError(f"{directory.path}: {error}") from None
        if not self._meanings:
            raise ModelError(
                f"{directory.path}: nothing among its labels ({', '.join(directory.labels)}) means NSFW: "
                "say which does with options.labels"
            )
        self.digest = digest
        self._directory, self._graph, self._preprocessor, self._options = directory, graph, preprocessor, options
        (self._input,) = graph.inputs
        self._batches = Batches(
            self._run, rows=1, threads=options.threads or min(4, os.cpu_count() or 1), name="onnx-image"
        )

    @classmethod
    def read(cls, options: ImageOptions) -> ImageDetector:
        """The model in the directory, tried with a picture. Blocking.

        Raises:
            ModelError: a file is missing or broken, or they do not belong together.
        """
        directory = Directory.read(Path(options.path), options.activation)
        preprocessor = Preprocessor.read(directory.path)
        graph = Graph(directory.graph)
        if len(graph.inputs) != 1:
            raise ModelError(
                f"{directory.graph}: takes {', '.join(graph.inputs)}: an image classifier takes pixel_values"
            )
        known = f"{directory.digest()} {options.model_dump_json()}"
        made = cls(directory, graph, preprocessor, options, hashlib.sha256(known.encode()).hexdigest())
        made._try()
        return made

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        """As `BatchDetector` says."""
        return [await self._scan(passage.text, asked.deadline_s) for passage in passages]

    async def close(self) -> None:
        """Give back its threads."""
        self._batches.close()

    async def _scan(self, picture: str, deadline_s: float) -> list[Finding]:
        try:
            answers = await self._batches.answers(lambda: self._frames(picture), deadline_s)
        except Unreadable as error:
            return [self._finding(picture, "NSFW", 1.0, error.reason)]
        best: dict[str, tuple[float, str]] = {}
        for label, score in zip(self._directory.labels, np.max(answers, axis=0), strict=True):
            if label in self._meanings:
                ours = self._meanings[label]
                best[ours] = max(best.get(ours, (0.0, label)), (float(score), label))
        return [self._finding(picture, ours, score, label) for ours, (score, label) in best.items()]

    def _finding(self, picture: str, label: str, score: float, rule: str) -> Finding:
        return Finding(self.family, label, 0, len(picture), score, f"{self.family}.{rule}")

    def _frames(self, picture: str) -> list[Pixels]:
        """In a thread: decoding takes as long as the picture is large."""
        raw = content(picture, self._options.max_bytes)
        return [self._preprocessor.pixels(frame) for frame in frames(raw, self._options.max_pixels)]

    def _run(self, rows: NDArray[Any]) -> Sequence[NDArray[np.float32]]:
        outputs = self._graph.run({self._input: rows})
        if not np.isfinite(outputs).all():
            raise ArithmeticError("the model answered what is no number")
        return activated(outputs, self._directory.activation)

    def _try(self) -> None:
        """Whether the graph takes the preprocessor's pictures, and its outputs are those that have a label."""
        empty = self._preprocessor.pixels(blank())
        try:
            shape = np.shape(self._run(empty[np.newaxis]))
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no common base
            reason = " ".join(str(error).split())[:200]
            file = self._directory.graph
            raise ModelError(f"{file}: does not take the pictures of preprocessor_config.json ({reason})") from None
        if shape != (1, len(self._directory.labels)):
            raise ModelError(
                f"{self._directory.graph}: answers {list(shape)} where config.json names "
                f"{len(self._directory.labels)} labels: they are not of one model, or it is no image classifier"
            )
