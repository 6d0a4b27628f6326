"""A classifier behind a server: vLLM's `/classify` and `/pooling`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from aim_guardrail.detectors.classifiers.options import ClassifierOptions
from aim_guardrail.detectors.onnx import Score
from aim_guardrail.detectors.remote import Remote, RemoteFailed

WINDOW_CHARS = 1000
INPUTS = 64
"""Windows in one request."""

Window = tuple[int, int, int]
"""Which text it is of, and its code points."""


class ServedClassifier:
    """The classifier that options name, asked over HTTP. What it says of a text depends on nothing but the text.

    Attributes:
        labels: as the policy names the server's outputs.
    """

    def __init__(self, options: ClassifierOptions) -> None:
        """Raises ValueError: the file of the key or of the certificates cannot be used."""
        assert options.classes is not None
        self.labels = options.classes
        served = options.served
        # The routes stand beside /v1, and clients write the base either way.
        self._remote = Remote(served.model_copy(update={"endpoint": served.endpoint.removesuffix("/v1")}))
        self._api = options.api or "classify"
        self._model = served.model
        self._window_chars = options.window_chars or WINDOW_CHARS
        known = (served.endpoint, self._model, self._api, self._window_chars, *self.labels)
        self.digest = hashlib.sha256(repr(known).encode()).hexdigest()

    async def classify(self, texts: Sequence[str], deadline_s: float) -> list[list[Score]]:
        """As `Classifier` says.

        Raises:
            TimeoutError, Misconfigured, RemoteFailed: as `Remote.post`; the last for an answer of another form, too.
        """
        windows = [(at, start, end) for at, text in enumerate(texts) for start, end in self._windows(len(text))]
        best: list[dict[str, Score]] = [{} for _ in texts]
        for first in range(0, len(windows), INPUTS):
            some = windows[first : first + INPUTS]
            for (at, start, end), scores in zip(some, await self._scores(texts, some, deadline_s), strict=True):
                for label, score in zip(self.labels, scores, strict=True):
                    if label not in best[at] or score > best[at][label].score:
                        best[at][label] = Score(label, score, start, end)
        return [list(scores.values()) for scores in best]

    async def close(self) -> None:
        """Close its connections."""
        await self._remote.close()

    def _windows(self, chars: int) -> Iterator[tuple[int, int]]:
        """Overlapping by a fifth, the last flush with the end."""
        last = max(0, chars - self._window_chars)
        for start in (*range(0, last, self._window_chars - self._window_chars // 5), last) if chars else ():
            yield start, min(start + self._window_chars, chars)

    async def _scores(self, texts: Sequence[str], windows: Sequence[Window], deadline_s: float) -> list[list[float]]:
        """https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html: the answers, by their own indexes."""
        inputs = [texts[at][start:end] for at, start, end in windows]
        body = {"model": self._model, "input": inputs}
        answer = await self._remote.post(f"/{self._api}", body, deadline_s)
        found = answer.get("data")
        if not isinstance(found, list) or len(found) != len(inputs):
            raise RemoteFailed(f"/{self._api} did not answer each of {len(inputs)} texts once")
        scores: dict[int, list[float]] = {item["index"]: self._read(item) for item in found if _has_index(item)}
        if sorted(scores) != list(range(len(inputs))):
            raise RemoteFailed(f"/{self._api} did not answer each of {len(inputs)} texts once")
        return [scores[at] for at in range(len(inputs))]

    def _read(self, item: dict[str, Any]) -> list[float]:
        values = item.get("probs" if self._api == "classify" else "data")
        if not isinstance(values, list) or len(values) != len(self.labels):
            raise RemoteFailed(f"/{self._api} answered what are not {len(self.labels)} numbers: check classes and api")
        for value in values:
            if type(value) not in (int, float) or not math.isfinite(value) or not -1e-6 <= value <= 1 + 1e-6:
                raise RemoteFailed(f"/{self._api} answered what is no probability: serve the model as a classifier")
        return [min(1.0, max(0.0, float(value))) for value in values]


def _has_index(item: Any) -> bool:
    return isinstance(item, dict) and type(item.get("index")) is int
