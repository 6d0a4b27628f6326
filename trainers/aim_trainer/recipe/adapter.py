"""LoRA: small matrices beside frozen ones."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model

from aim_trainer.errors import JobError
from aim_trainer.job.job import FineTuningJob

#: The last linear module: a language model's, a classifier's, as transformers names them in the decoder families.
HEADS = (LANGUAGE_HEAD, CLASSIFIER_HEAD) = ("lm_head", "score")


def with_adapter(model: Any, job: FineTuningJob) -> Any:
    """The model with a fresh adapter, float32, whose second matrices are zero: at first it says what the model says.

    A classifier's head is new, so it is trained whole and kept in the adapter. Raises JobError for target modules
    that the model does not have.
    """
    hyperparameters, classifies = job.spec.hyperparameters, job.spec.template == "classification"
    targets = _targets(model, hyperparameters.target_modules)
    # Where it lies, not where it was read from: PEFT writes this into the adapter.
    model.name_or_path = job.spec.base_model.model_id.removeprefix("hf://").removeprefix("file://")
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM,
        base_model_name_or_path=model.name_or_path,
        revision=job.spec.base_model.revision,
        r=hyperparameters.lora_rank,
        lora_alpha=hyperparameters.lora_alpha,
        lora_dropout=hyperparameters.lora_dropout,
        target_modules=targets,
        use_rslora=hyperparameters.rslora,
        modules_to_save=[CLASSIFIER_HEAD] if classifies else None,
        bias="none",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    config.target_modules = targets  # PEFT made it a set, whose order in the file is another each time
    return adapted


def _targets(model: Any, asked: list[str] | str) -> list[str]:
    """all-linear: every linear module but the head. The experts of a mixture are no linear modules but one weight of
    three dimensions: engines load no adapters of those.
    """
    # Quantised linear modules are subclasses of torch's.
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    last = sorted({name.rpartition(".")[2] for name in linear})
    if asked == "all-linear":
        return [name for name in last if name not in HEADS]
    for target in asked:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise JobError(
                f"spec.hyperparameters.loraTargetModules: {target!r} is no linear module of this model",
                field="spec.hyperparameters.loraTargetModules",
                value=target,
                remedy=f"there are {', '.join(last)}; all-linear takes all but the head",
            )
    return sorted(asked)
