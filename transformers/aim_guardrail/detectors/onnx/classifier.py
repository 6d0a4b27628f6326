"""A text classifier: windows of each text through a graph, the best of them for every label."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aim_guardrail.detectors.onnx.batches import BATCH_ROWS, Batches
from aim_guardrail.detectors.onnx.directory import Activation, Directory, ModelError
from aim_guardrail.detectors.onnx.graph import Graph
from aim_guardrail.detectors.onnx.windows import TokenizerWindows, Window, Windower

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Score:
    """How much a label applies, 0..1, and where: the window (code points, end exclusive) that scores highest."""

    label: str
    score: float
    start: int
    end: int


class TextClassifier:
    """A sequence classifier. What it says of a text depends on nothing but the text: rows share a batch only with rows
    of their own length, and no batch at all where the graph quantises dynamically.

    Attributes:
        labels: in the order of its outputs.
        digest: changes whenever what it says may.
    """

    def __init__(
        self,
        graph: Graph,
        windower: Windower,
        labels: Sequence[str],
        activation: Activation,
        digest: str,
        threads: int | None = None,
    ) -> None:
        """``threads``: how many batches run at once, by default one for each CPU, four at most. Raises ModelError."""
        self.labels = tuple(labels)
        self.digest = digest
        self._graph = graph
        self._windower = windower
        self._activation = activation
        rows = 1 if graph.mixes_rows or graph.inputs["input_ids"][1][0] == 1 else BATCH_ROWS
        threads = threads or min(4, os.cpu_count() or 1)
        self._batches = Batches(self._run, rows=rows, threads=threads, name="onnx-text")

    @classmethod
    def read(cls, path: Path, activation: Activation | None = None, threads: int | None = None) -> TextClassifier:
        """The classifier in a Hugging Face directory, tried with a text. Blocking.

        Raises:
            ModelError: a file is missing or broken, or they do not belong together.
        """
        directory = Directory.read(path, activation)
        graph = Graph(directory.graph)
        _check_inputs(directory.graph, graph)
        windower = TokenizerWindows(path / "tokenizer.json", directory.max_tokens)
        made = cls(graph, windower, directory.labels, directory.activation, directory.digest(), threads)
        made._try(directory)
        return made

    async def classify(self, texts: Sequence[str], deadline_s: float) -> list[list[Score]]:
        """Of each text every label's score, in the order of `labels`; none of a text that holds no token.

        Raises:
            TimeoutError: a window's turn did not come by ``deadline_s`` (``time.monotonic``).
            Overloaded: too many wait for this model.
            ArithmeticError: the model answered what is no number.
        """
        windows: list[list[Window]] = []

        def prepare() -> list[NDArray[np.int64]]:
            windows.extend(list(self._in_time(text, deadline_s)) for text in texts)
            return [window.ids for each in windows for window in each]

        answers = iter(await self._batches.answers(prepare, deadline_s))
        return [self._best(each, [next(answers) for _ in each]) for each in windows]

    def _in_time(self, text: str, deadline_s: float) -> Iterator[Window]:
        """A text's windows. Raises TimeoutError: they are not all made by then."""
        for window in self._windower.windows(text):
            if time.monotonic() >= deadline_s:
                raise TimeoutError("the text is too long to be read in time")
            yield window

    def judge(self, text: str) -> list[Score]:
        """The same of one text, here and now: blocking, for whoever has a thread of its own."""
        windows = list(self._windower.windows(text))
        return self._best(windows, [self._run(window.ids[np.newaxis])[0] for window in windows])

    async def close(self) -> None:
        """Give back its threads."""
        self._batches.close()

    def _best(self, windows: Sequence[Window], answers: Sequence[Floats]) -> list[Score]:
        if not windows:
            return []
        scores = np.stack(answers)
        found = zip(self.labels, scores.argmax(0), scores.max(0), strict=True)
        return [Score(label, float(score), windows[at].start, windows[at].end) for label, at, score in found]

    def _run(self, rows: NDArray[np.int64]) -> Sequence[Floats]:
        """Scores, (rows, labels), of ids, (rows, tokens)."""
        feeds = {name: _FEEDS[name](rows).astype(kind) for name, (kind, _) in self._graph.inputs.items()}
        outputs = self._graph.run(feeds)
        if not np.isfinite(outputs).all():
            raise ArithmeticError("the model answered what is no number")
        return activated(outputs, self._activation)

    def _try(self, directory: Directory) -> None:
        """Whether the tokenizer's tokens are the graph's, and its outputs those that have a label."""
        try:
            (window,) = self._windower.windows("hello")
            shape = np.shape(self._run(window.ids[np.newaxis]))
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no common base
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{directory.graph}: does not take the tokens of tokenizer.json ({reason})") from None
        if shape != (1, len(self.labels)):
            raise ModelError(
                f"{directory.graph}: answers {list(shape)} where config.json names {len(self.labels)} labels: "
                "they are not of one model, or it is no sequence classifier"
            )


def _check_inputs(file: Path, graph: Graph) -> None:
    unknown = [name for name in graph.inputs if name not in _FEEDS]
    if unknown or "input_ids" not in graph.inputs:
        raise ModelError(
            f"{file}: takes {', '.join(graph.inputs)}: a sequence classifier takes input_ids, and no more than "
            "attention_mask and token_type_ids beside it"
        )
    for name, (_, sizes) in graph.inputs.items():
        if len(sizes) != 2 or sizes[0] not in (None, 1) or sizes[1] is not None:
            raise ModelError(f"{file}: {name} is fixed to {sizes}: export it with dynamic axes for batch and sequence")


def activated(outputs: Floats, activation: Activation) -> list[Floats]:
    """Scores of each row of outputs."""
    return list(_ACTIVATIONS[activation](outputs))


def _sigmoid(outputs: Floats) -> Floats:
    with np.errstate(over="ignore"):
        scores: Floats = np.float32(1) / (np.float32(1) + np.exp(-outputs))
    return scores


def _softmax(outputs: Floats) -> Floats:
    powers = np.exp(outputs - outputs.max(-1, keepdims=True))
    scores: Floats = powers / powers.sum(-1, keepdims=True)
    return scores


_ACTIVATIONS: dict[Activation, Callable[[Floats], Floats]] = {"sigmoid": _sigmoid, "softmax": _softmax}
_FEEDS: dict[str, Callable[[NDArray[np.int64]], NDArray[np.int64]]] = {
    "input_ids": lambda rows: rows,
    "attention_mask": np.ones_like,  # no row is padded
    "token_type_ids": np.zeros_like,
}
