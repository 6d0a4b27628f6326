"""A job's model: loaded as its method wants it, and written as others read it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, GgufConfig

from aim_trainer.job.job import FineTuningJob
from aim_trainer.scratch import scratch

from .adapter import HEADS, with_adapter
from .base import locate, read_config, read_tokenizer, said_of
from .neftune import add_noise
from .weights import gathered, trained_weights
from .workers import Workers

# That int8 is computed in float16 is said again with every module.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@dataclass(slots=True)
class Loaded:
    """model: transformers' own, or PEFT's around it. compute: what is computed in. What is trained is float32 whatever
    that is: steps smaller than bfloat16 can tell from nothing would be lost.
    """

    model: Any
    tokenizer: Any
    compute: torch.dtype
    device: str

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")


def load(job: FineTuningJob, device: str = "cpu") -> Loaded:
    """The base model and what is trained of it, on `device`; of strategy fsdp2 on the CPU, until it is sharded.

    Raises JobError for a model, architecture or target modules that there are not.
    """
    hyperparameters = job.spec.hyperparameters
    compute = compute_dtype(job, device)
    if device != "cpu":
        torch.cuda.set_device(device)  # generators and bitsandbytes mean the current one
    torch.manual_seed(hyperparameters.seed)  # a fresh adapter's, a classifier's head
    model = _base_model(job, compute, "cpu" if job.spec.distributed.strategy == "fsdp2" else device)
    model.config.use_cache = False
    if job.spec.method != "full":
        model.requires_grad_(False)
        model = with_adapter(model, job)
    if hyperparameters.neftune_alpha:
        add_noise(model, hyperparameters.neftune_alpha)
    if hyperparameters.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Loaded(model, read_tokenizer(job.spec.base_model), compute, device)


def compute_dtype(job: FineTuningJob, device: str) -> torch.dtype:
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    precision = job.spec.hyperparameters.precision
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def save(loaded: Loaded, into: Path, workers: Workers | None = None) -> None:
    """An adapter in float32 (PEFT's two files), or the whole model in what it was computed in; the tokenizer beside
    it. Every worker calls it, the first alone writes.
    """
    first = workers is None or workers.first
    trained = gathered(trained_weights(loaded.model), kept=first)
    if not first:
        return
    if loaded.has_adapter:
        loaded.model.save_pretrained(into, state_dict=trained, save_embedding_layers=False)
    else:
        kept = loaded.model.state_dict()
        for name, _ in loaded.model.named_parameters(remove_duplicate=False):
            del kept[name]  # what is tied is written once
        state = {name: value.to(loaded.compute) for name, value in trained.items()}
        loaded.model.save_pretrained(into, state_dict=state | kept)
    loaded.tokenizer.save_pretrained(into)


def _base_model(job: FineTuningJob, compute: torch.dtype, device: str) -> Any:
    config = read_config(job.spec.base_model)  # refuses a family that is not known
    base = locate(job.spec.base_model)
    arguments: dict[str, Any] = {"dtype": torch.float32 if job.spec.method == "full" else compute, "config": config}
    if job.spec.template == "classification":
        config.update(_labels(job))
    if device != "cpu":
        arguments["device_map"] = {"": device}
    with said_of(job.spec.base_model):
        if not base.gguf_file:
            return _kind(job).from_pretrained(**base.arguments(), **_quantized(job, compute), **arguments)
        dequantize = {"quantization_config": GgufConfig(dequantize=True)}
        model = _plain(_kind(job).from_pretrained(**base.arguments(), **dequantize, **arguments))
        if job.spec.method != "qlora":
            return model
        # bitsandbytes quantises what it reads from safetensors only.
        with scratch() as directory:
            model.save_pretrained(directory)
            return _kind(job).from_pretrained(directory, **_quantized(job, compute), **arguments)


def _kind(job: FineTuningJob) -> Any:
    return AutoModelForSequenceClassification if job.spec.template == "classification" else AutoModelForCausalLM


def _labels(job: FineTuningJob) -> dict[str, Any]:
    labels = job.spec.dataset.labels
    tokenizer = read_tokenizer(job.spec.base_model)
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "pad_token_id": tokenizer.pad_token_id,  # a sequence's last token is the last that is no padding
    }


def _quantized(job: FineTuningJob, compute: torch.dtype) -> dict[str, Any]:
    if job.spec.method != "qlora":
        return {}
    heads = list(HEADS)
    if job.spec.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)}
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=heads, **nf4)}


def _plain(model: Any) -> Any:
    """transformers leaves the marks of a quantised model on one that it dequantised; then it refuses to write it."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model
