"""The result of a run as a model in memory: the base as it is served, with what was trained."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from aim_trainer.job.job import FineTuningJob
from aim_trainer.recipe.base import locate, read_tokenizer
from aim_trainer.recipe.model import compute_dtype, load

from .adapter import with_adapter_of


def base_files(job: FineTuningJob) -> Path:
    """The base model's directory, or its GGUF file; a hub's model as it lies in the hub's cache."""
    base = locate(job.spec.base_model)
    if base.gguf_file:
        return Path(base.name, base.gguf_file)
    if Path(base.name).is_dir():
        return Path(base.name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base.name, revision=base.revision, local_files_only=True))


def tuned_tokenizer(job: FineTuningJob) -> Any:
    """The base model's: training adds no token."""
    return read_tokenizer(job.spec.base_model)


def tuned_model(job: FineTuningJob, result: Path, tokenizer: Any) -> Any:
    """The base model in the precision it was computed in, not quantised, with the adapter beside it; the whole model of
    method full. Raises JobError: the adapter is not applied.
    """
    dtype = compute_dtype(job, "cuda" if torch.cuda.is_available() else "cpu")
    if job.spec.method == "full":
        kind = AutoModelForSequenceClassification if job.spec.template == "classification" else AutoModelForCausalLM
        return kind.from_pretrained(result, dtype=dtype).eval()
    return with_adapter_of(_plain_base(job).to(dtype), result, tokenizer).eval()


def _plain_base(job: FineTuningJob) -> Any:
    """The base model in float32, neither quantised nor with an adapter: as method full loads it."""
    plain = {"gradient_checkpointing": False, "neftune_alpha": None}
    hyperparameters = job.spec.hyperparameters.model_copy(update=plain)
    spec = job.spec.model_copy(update={"method": "full", "quantization": None, "hyperparameters": hyperparameters})
    return load(job.model_copy(update={"spec": spec})).model


def merged(model: Any) -> Any:
    """Without the adapter, its weights added in float32. safe_merge refuses what is not finite."""
    if not hasattr(model, "merge_and_unload"):
        return model
    dtype = model.dtype
    made = model.float().merge_and_unload(safe_merge=True).to(dtype)
    gc.collect()
    return made


def write_merged(model: Any, into: Path) -> None:
    """config.json and safetensors."""
    model.config.use_cache = True
    model.save_pretrained(into)
    (into / "generation_config.json").unlink(missing_ok=True)
