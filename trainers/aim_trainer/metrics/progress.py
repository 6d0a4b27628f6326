"""`progress.json`: how far a run is, in the words of Kubeflow Trainer.

The file is the body that its controller takes at KUBEFLOW_TRAINER_STATUS_URL (UpdateTrainJobStatusRequest):
{"trainerStatus": {"progressPercentage": 45, "estimatedRemainingSeconds": 320, "metrics": [{"name": "loss",
"value": "1.93"}, …], "lastUpdatedTime": "2026-01-23T10:30:45Z"}}
"""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from .records import Evaluation, Note, Record, Saved, Step

#: Two writes are at least so far apart; the last step, evaluations, checkpoints and notes are written at once.
INTERVAL_S = 1.0


class Progress:
    """Replaces the file as a whole: a reader never sees half of one."""

    def __init__(self, file: Path, interval_s: float = INTERVAL_S) -> None:
        self._file, self._interval_s = file, interval_s
        self._step: Step | None = None
        self._metrics: dict[str, float | str] = {}
        self._written_at = -math.inf

    def tell(self, record: Record) -> None:
        """Raises OSError: the place is full or away."""
        match record:
            case Step():
                self._step = record
            case Evaluation():
                self._metrics |= record.metrics
            case Saved():
                self._metrics["checkpointStep"] = record.step
            case Note():
                self._metrics["state"] = record.kind
        ended = isinstance(record, Step) and record.step >= record.steps
        if ended or not isinstance(record, Step) or time.monotonic() - self._written_at >= self._interval_s:
            self._write()

    def close(self) -> None:
        """Writes what was held back."""
        if self._step is not None:
            self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(self._file.name + ".part")
        partial.write_bytes(orjson.dumps({"trainerStatus": self._status()}, option=orjson.OPT_INDENT_2))
        partial.replace(self._file)
        self._written_at = time.monotonic()

    def _status(self) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        step = self._step
        if step is None:
            return {"metrics": _named(self._metrics), "lastUpdatedTime": now}
        left = {"estimatedRemainingSeconds": round(max(0, step.eta_s))} if math.isfinite(step.eta_s) else {}
        # Rounded down: 100 is said when all is done.
        percentage = min(100, 100 * step.step // step.steps)
        return {
            "progressPercentage": percentage,
            **left,
            "metrics": _named(_measures(step) | self._metrics),
            "lastUpdatedTime": now,
        }


def _measures(step: Step) -> dict[str, float | str]:
    """The first and the last two words are those of Kubeflow's own examples."""
    return {
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "grad_norm": step.grad_norm,
        "tokens_per_second": step.tokens_per_second,
        "currentStep": step.step,
        "totalSteps": step.steps,
        "currentEpoch": step.epoch,
    }


def _named(metrics: dict[str, float | str]) -> list[dict[str, str]]:
    """Values are text there, and neither name nor value is longer than 64 characters."""
    return [{"name": name[:64], "value": _text(value)[:64]} for name, value in metrics.items()][:256]


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else str(value)
