"""How far a run is, in the words of Kubeflow Trainer: the body of its UpdateTrainJobStatusRequest.

{"trainerStatus": {"progressPercentage": 45, "estimatedRemainingSeconds": 320, "metrics": [{"name": "loss",
"value": "1.93"}, …], "lastUpdatedTime": "2026-01-23T10:30:45Z"}}
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import orjson

from .records import Evaluation, Note, Record, Saved, Step

# Bounds of the API's own validation.
_MOST_METRICS, _LONGEST = 256, 64
_FIELDS = ("progressPercentage", "estimatedRemainingSeconds", "metrics")


class TrainerStatus:
    """The newest of each kind. before: an earlier body, which what is told now goes on from; one that cannot be read is
    nothing.
    """

    def __init__(self, before: bytes = b"") -> None:
        self.step: Step | None = None
        self._before = _status_of(before)
        self._metrics: dict[str, float | str] = _metrics_of(self._before)

    def add(self, record: Record) -> bool:
        """Whether it should be known at once: all but steps before the last."""
        match record:
            case Step():
                self.step = record
                self._metrics["state"] = "training"
                return record.step >= record.steps
            case Evaluation():
                self._metrics |= record.metrics
            case Saved():
                self._metrics["checkpointStep"] = record.step
            case Note():
                self._metrics["state"] = record.kind
        return True

    def body(self) -> bytes:
        """As JSON. What is unknown is left out."""
        status: dict[str, object] = dict(self._before)
        step = self.step
        if step is not None:
            # Rounded down: 100 is said when all is done.
            status["progressPercentage"] = min(100, 100 * step.step // step.steps)
            status.pop("estimatedRemainingSeconds", None)
            if math.isfinite(step.eta_s):
                status["estimatedRemainingSeconds"] = round(max(0, step.eta_s))
        status["metrics"] = _named(self._metrics | (_measures(step) if step else {}))
        status["lastUpdatedTime"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return orjson.dumps({"trainerStatus": status}, option=orjson.OPT_INDENT_2)


def _status_of(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)["trainerStatus"]
        return {key: found[key] for key in _FIELDS if key in found}
    except (ValueError, KeyError, TypeError):
        return {}


def _metrics_of(status: dict[str, Any]) -> dict[str, float | str]:
    try:
        return {each["name"]: str(each["value"]) for each in status.get("metrics", [])}
    except (KeyError, TypeError):
        return {}


def _measures(step: Step) -> dict[str, float | str]:
    """The first and the last three names are those of Kubeflow's own examples, or after them."""
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
    """Values are text there."""
    return [{"name": name[:_LONGEST], "value": _text(value)[:_LONGEST]} for name, value in metrics.items()][
        :_MOST_METRICS
    ]


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else str(value)
