"""The embedded models `strong` and `cascade`: the linear model and the encoder, each judging what the other may miss.

A score is the mean of both logits, each calibrated. `strong` has the encoder read every window of a text; `cascade`
only what the linear model finds at all suspicious, and of a long text the few places where it is most so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from aim_guardrail.detectors.injection.encoder import Encoder
from aim_guardrail.detectors.injection.linear import Worst
from aim_guardrail.detectors.injection.model import Injection, Judged, ModelError, StrongCard, embedded, judged
from aim_guardrail.detectors.injection.normalise import copies

MOST_SPOTS = 4  # of a copy of a text


class Strong:
    """Thread-safe; blocking: about 5 ms for each window of 126 tokens that the encoder reads."""

    def __init__(self, fast: Injection, encoder: Encoder, card: StrongCard, gated: bool) -> None:
        self._fast = fast
        self._encoder = encoder
        self._gated = gated
        self.card = card

    def score(self, text: str) -> float:
        """0..1, higher is worse."""
        return self.judge(text).score

    def glance(self, text: str) -> Judged | None:
        """The score where the encoder need not be asked, in the time of the linear model; else nothing."""
        if not self._gated:
            return None
        spelt, linear = self._linear(text)
        return None if max(linear).logit >= self.card.gate else self._by_linear(text, spelt, linear)

    def judge(self, text: str, deadline_s: float = math.inf) -> Judged:
        """The score, and of which part. Raises TimeoutError once `time.monotonic` passes the deadline."""
        spelt, linear = self._linear(text, deadline_s)
        if self._gated and max(linear).logit < self.card.gate:
            return self._by_linear(text, spelt, linear)
        chosen = to_read(linear)
        read = [
            self._read(copy, found, deadline_s) if wanted else Worst(-math.inf, 0, 0)
            for copy, found, wanted in zip(spelt, linear, chosen, strict=True)
        ]
        logits = self._fast.card.calibrated(max(linear).logit), self.card.calibrated(max(read).logit)
        return judged(text, spelt[0], linear if logits[0] > logits[1] else read, sum(logits) / 2)

    def _linear(self, text: str, deadline_s: float = math.inf) -> tuple[list[str], list[Worst]]:
        spelt = copies(text)
        return spelt, [self._fast.linear.worst(copy, deadline_s) for copy in spelt]

    def _by_linear(self, text: str, spelt: list[str], linear: list[Worst]) -> Judged:
        return judged(text, spelt[0], linear, self._fast.card.calibrated(max(linear).logit))

    def _read(self, copy: str, found: Worst, deadline_s: float) -> Worst:
        """What the encoder makes of a copy; where it is gated, of its spots."""
        if not self._gated:
            return self._encoder.worst(copy, deadline_s)
        if found.logit < self.card.gate:
            return Worst(-math.inf, 0, len(copy))
        spots = self._fast.linear.spots(copy, self.card.gate, MOST_SPOTS)
        read = ((start, self._encoder.worst(copy[start:end], deadline_s)) for start, end in spots)
        return max(Worst(worst.logit, start + worst.start, start + worst.end) for start, worst in read)


def to_read(linear: Sequence[Worst]) -> list[bool]:
    """Which copies of a text the encoder reads: its normal form, and those that the linear model finds worse."""
    return [index == 0 or found.logit > linear[0].logit for index, found in enumerate(linear)]


def strong(gated: bool) -> Strong:
    """A model of this package; its files are read once. Raises ModelError."""
    card, encoder = _package()
    return Strong(embedded(), encoder, card, gated)


@functools.cache
def _package() -> tuple[StrongCard, Encoder]:
    return read(Path(str(resources.files("aim_guardrail.detectors.injection"))))


def read(folder: Path) -> tuple[StrongCard, Encoder]:
    """The encoder in a folder, and what its numbers mean. Raises ModelError."""
    try:
        card = StrongCard.model_validate_json((folder / "strong.json").read_bytes())
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder}/strong.json: {reason}; install the package anew") from None
    return card, Encoder.read(folder, card.sha256, card.base)
