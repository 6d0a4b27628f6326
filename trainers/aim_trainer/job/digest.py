"""Which parts of a job decide the weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .job import FineTuningJob


def spec_digest(job: FineTuningJob) -> str:
    """sha256 (hex) over what decides the weights: model, method, data, and hyperparameters but for those that only
    decide how fast it goes.

    Not in it: names, places, gates, resources. batchSize and workers are in it as their product where no
    globalBatchSize is given: that is the batch then. Where one is, they may change and the mathematics stay.
    """
    return hashlib.sha256(json.dumps(_decides(job), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _decides(job: FineTuningJob) -> dict[str, Any]:
    spec = job.spec
    hyper = spec.hyperparameters.model_dump(mode="json", exclude={"gradient_checkpointing", "batch_size"})
    if hyper["global_batch_size"] is None:
        rows, workers = spec.hyperparameters.batch_size, spec.distributed.workers
        hyper["global_batch_size"] = f"auto × {workers}" if rows == "auto" else rows * workers
    return {
        "model": [spec.base_model.model_id, spec.base_model.revision],
        "method": [spec.method, (spec.quantization or "nf4") if spec.method == "qlora" else None],
        "template": spec.template,
        "dataset": spec.dataset.model_dump(mode="json"),
        "hyperparameters": hyper,
    }
