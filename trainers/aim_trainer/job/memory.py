"""What a job takes of each device, by aim_profile's formulas."""

from __future__ import annotations

from typing import Any

from aim_profile.models.facts import ModelFacts
from aim_profile.models.load import load_model
from aim_profile.sizing.fit import DEFAULT_UTILIZATION, budget_bytes
from aim_profile.sizing.training import Memory, Training, largest_batch, memory

from .job import FineTuningJob
from .steps import largest_micro_batch


def facts_of(job: FineTuningJob) -> ModelFacts:
    """What is known of its base model. Raises AimProfileError: not in the catalogue, and no directory or file."""
    return load_model(_named(job))


def training_of(job: FineTuningJob, batch: int | None = None) -> Training:
    """The job as it is sized. batch: rows of a pass, where batchSize is auto; None: 1."""
    spec, hyper, shared = job.spec, job.spec.hyperparameters, job.spec.distributed
    micro = hyper.batch_size if hyper.batch_size != "auto" else batch or 1
    own: dict[str, Any] = {}
    if spec.method != "full":
        own = {
            "lora_rank": hyper.lora_rank,
            "lora_targets": tuple(hyper.lora_target_modules),
            "lora_dropout": hyper.lora_dropout,
        }
    return Training(
        model=_named(job),
        method=spec.method,
        quantization=spec.quantization,
        batch=micro,
        context=hyper.max_seq_length,
        precision=_precision(job),
        gradient_checkpointing=hyper.gradient_checkpointing,
        accumulation=max(1, (hyper.global_batch_size or 0) // (micro * shared.workers)),
        workers=shared.workers,
        strategy=shared.strategy,
        classes=len(spec.dataset.labels) or None,
        **own,
    )


def _named(job: FineTuningJob) -> str:
    """The base model as aim_profile knows it: an id or a path."""
    return job.spec.base_model.model_id.removeprefix("hf://").removeprefix("file://")


def on_cpu(job: FineTuningJob) -> bool:
    """Whether its workers have no GPU."""
    return job.spec.resources.gpu == 0


def needed(job: FineTuningJob, facts: ModelFacts, batch: int | None = None) -> Memory:
    """The parts, in bytes on each device. Raises SizingError."""
    return memory(facts, training_of(job, batch), on_cpu=on_cpu(job))


def batch_that_fits(job: FineTuningJob, facts: ModelFacts, device_bytes: int) -> int:
    """Rows of one pass with which the job fits a device of that size: batchSize, or where it is auto the most with
    which globalBatchSize divides; 0: it does not fit. A tenth of the device is left to fragmentation.
    """
    budget = budget_bytes(device_bytes, DEFAULT_UTILIZATION)
    hyper = job.spec.hyperparameters
    if hyper.batch_size != "auto":
        return hyper.batch_size if needed(job, facts).total <= budget else 0
    # Passes add up with one row; with more of them perhaps not, which takes less.
    most = largest_batch(facts, training_of(job), budget, on_cpu=on_cpu(job))
    return largest_micro_batch(job, most) if most else 0


def _precision(job: FineTuningJob) -> Any:
    asked = job.spec.hyperparameters.precision
    return ("fp32" if on_cpu(job) else "bf16") if asked == "auto" else asked
