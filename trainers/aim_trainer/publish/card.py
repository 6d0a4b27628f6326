"""README.md: the model card, in the hub's own form. The licence is the owner's to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aim_profile.files.write import dump
from aim_trainer.job.job import FineTuningJob

from .models_file import is_local
from .provenance import Provenance

FILE = "README.md"


def card(job: FineTuningJob, origin: Provenance, form: str, files: dict[str, str]) -> str:
    """form: adapter, merged or classifier; files: each that stands beside it → what it is for."""
    name = job.metadata.name
    sections = [_front(job, origin, form), f"# {name}\n", _summary(job, origin, form), _metrics(origin)]
    listed = "".join(f"| `{file}` | {purpose} |\n" for file, purpose in files.items())
    sections.append(f"## Files\n\n| file | |\n|---|---|\n{listed}")
    sections.append(_made_from(origin))
    return "\n".join(section for section in sections if section)


def _front(job: FineTuningJob, origin: Provenance, form: str) -> str:
    """https://huggingface.co/docs/hub/model-cards"""
    front: dict[str, Any] = {
        "license": "unknown",
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-classification" if form == "classifier" else "text-generation",
        "tags": ["fine-tuned", origin.method],
    }
    if not is_local(origin.base):
        front |= {"base_model": origin.base.removeprefix("hf://")}
        front |= {"base_model_relation": "adapter" if form == "adapter" else "finetune"}
    return f"---\n{dump(front)}---\n"


def _summary(job: FineTuningJob, origin: Provenance, form: str) -> str:
    hyper, spec = job.spec.hyperparameters, job.spec
    base = f"`{Path(origin.base).name if is_local(origin.base) else origin.base}`"
    at = f" at revision `{origin.revision}`" if origin.revision else ""
    rows = f"{origin.rows} rows" if origin.rows is not None else "rows no longer at hand"
    lora = "" if spec.method == "full" else f", rank {hyper.lora_rank}, alpha {hyper.lora_alpha:g}"
    quantized = f" over a base in {spec.quantization or 'nf4'}" if spec.method == "qlora" else ""
    length = f"{hyper.max_steps} steps" if hyper.max_steps else f"{hyper.epochs:g} epochs"
    return (
        f"{base}{at}, fine-tuned for {spec.template} on {rows}; published as {form}.\n\n"
        f"Method: {spec.method}{quantized}{lora}; learning rate {hyper.learning_rate:g}, {length}, "
        f"rows of at most {hyper.max_seq_length} tokens, seed {hyper.seed}.\n\n"
        "License: not stated here. The owner sets it; the base model's and the data's terms apply.\n"
    )


def _metrics(origin: Provenance) -> str:
    if not origin.metrics:
        return "## Metrics\n\nNot evaluated.\n"
    rows = "".join(
        f"| {name} | {_figure(base)} | {_figure(tuned)} |\n" for name, (base, tuned) in origin.metrics.items()
    )
    return f"## Metrics\n\nOn held-out rows.\n\n| metric | base | tuned |\n|---|---|---|\n{rows}"


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _made_from(origin: Provenance) -> str:
    tools = ", ".join(f"{tool} {version}" for tool, version in origin.tools.items())
    return (
        "## Made from\n\n| | SHA-256 |\n|---|---|\n"
        f"| base model's files | `{origin.base_digest}` |\n"
        f"| job | `{origin.job_digest}` |\n"
        f"| tokenised rows | `{origin.data_digest or 'unknown'}` |\n\n{tools}\n"
    )
