"""A LoRA adapter as vLLM takes it: two files, the base named as the job names it, and proof that it is applied.

vLLM's rules (PEFTHelper, LoRAConfig): only lora_A and lora_B, no bias, no DoRA, no modules_to_save. A module whose name
matches nothing is left out without a word, there and in PEFT, and the base model answers in the adapter's name.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from aim_trainer.errors import JobError
from aim_trainer.job.hyperparameters import LORA_RANKS
from aim_trainer.job.job import BaseModel_

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_REFUSED = {"bias": "none", "use_dora": False, "modules_to_save": None, "lora_bias": False}
_PROMPT = "What is the capital of France?"


def served_rank(rank: int) -> int:
    """`--max-lora-rank`: the least that vLLM allows and that holds `rank`."""
    return next(allowed for allowed in LORA_RANKS if allowed >= rank)


def read_adapter(directory: Path) -> dict[str, Any]:
    """Its configuration. Raises JobError: vLLM would refuse it, or serve less than was trained."""
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        raise _refused(f"{directory} has no {CONFIG} or no {WEIGHTS}", "run the job again")
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    for field, wanted in _REFUSED.items():
        if config.get(field, wanted) != wanted:
            raise _refused(
                f"the adapter has {field}: {config[field]}, which vLLM does not serve", "set output.format: merged"
            )
    strange = [name for name in _names(directory) if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange:
        raise _refused(
            f"the adapter holds {strange[0]}, which is neither lora_A nor lora_B", "set output.format: merged"
        )
    if config["r"] > LORA_RANKS[-1]:
        raise _refused(f"rank {config['r']} is more than vLLM's {LORA_RANKS[-1]}", "set output.format: merged")
    return config


def write_adapter(directory: Path, base: BaseModel_, into: Path) -> None:
    """The two files; the same adapter is the same bytes each time. Raises JobError."""
    config = read_adapter(directory)
    config |= {"base_model_name_or_path": base.model_id, "revision": base.revision, "inference_mode": True}
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()  # PEFT writes a set, in any order
    (into / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(directory / WEIGHTS, into / WEIGHTS)


def with_adapter_of(model: Any, directory: Path, tokenizer: Any) -> Any:
    """`model` (in place) with the adapter of `directory`, which is known to be applied whole.

    Raises JobError: tensors that name no module of the model, or logits as without it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of missing keys, which are refused below
        tuned = PeftModel.from_pretrained(model, directory)
    held, applied = set(_names(directory)), set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    if left := sorted(held - applied):
        why = f"{len(left)} of the adapter's {len(held)} tensors name no module of the base model ({left[0]} …)"
        raise _refused(why, "publish it for the base model it was trained on")
    if not _differs(tuned, tokenizer):
        why = "with the adapter the base model answers as without it: nothing of it is applied, or it learned nothing"
        raise _refused(why, "train longer or at a higher learningRate, for this very base model")
    return tuned


def _differs(tuned: Any, tokenizer: Any) -> bool:
    """Whether any logit of a prompt changes: both are computed alike, so what is not applied leaves them equal."""
    tuned.eval()
    asked = tokenizer(_PROMPT, return_tensors="pt").to(tuned.device)
    with torch.inference_mode():
        changed = tuned(**asked).logits
        with tuned.disable_adapter():
            plain = tuned(**asked).logits
    return not torch.equal(changed, plain)


def _names(directory: Path) -> list[str]:
    with safe_open(directory / WEIGHTS, framework="pt") as opened:
        return list(opened.keys())


def _refused(why: str, remedy: str) -> JobError:
    return JobError(f"spec.output.format: {why}", field="spec.output.format", value="adapter", remedy=remedy)
