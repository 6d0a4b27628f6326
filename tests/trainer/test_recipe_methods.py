"""Every method on every architecture: the loss falls, only the right weights change, what is written says the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from aim_trainer.data.tokens import Tokens
from aim_trainer.recipe.model import load, save
from tiny_models import ARCHITECTURES
from tiny_runs import chat_tokens, run_tiny, tiny_job

Tiny = Callable[[str], Path]
METHODS = {
    "lora": {"method": "lora"},
    "nf4": {"method": "qlora", "quantization": "nf4"},
    "int8": {"method": "qlora", "quantization": "int8"},
    "full": {"method": "full"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return chat_tokens(tmp_path_factory.mktemp("rows"), 32)


def logits(model: Any, rows: Tokens) -> torch.Tensor:
    """Of two rows, one after the other."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor(rows[row].tokens[None]).long()).logits[0] for row in (0, 1)])


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_method_trains_each_architecture(
    tiny: Tiny, rows: Tokens, tmp_path: Path, architecture: str, how: str
) -> None:
    job = tiny_job(tiny(architecture), **METHODS[how], maxSteps=6)
    before = {name: weight.detach().clone() for name, weight in load(job).model.named_parameters()}
    ran = run_tiny(job, rows, tmp_path / "checkpoints")

    losses = ran.told.losses
    assert losses[-1] < losses[0] - (0.5 if how == "full" else 0.2), losses
    changed = {
        name for name, weight in ran.loaded.model.named_parameters() if not torch.equal(weight.detach(), before[name])
    }
    if how == "full":
        assert changed == set(before)
    else:
        assert changed == {name for name in before if ".lora_" in name}

    save(ran.loaded, tmp_path / "result")
    kind = AutoModelForCausalLM if how == "full" else AutoPeftModelForCausalLM
    if how in ("full", "lora"):
        reloaded = kind.from_pretrained(tmp_path / "result", dtype=torch.float32)
        torch.testing.assert_close(logits(reloaded, rows), logits(ran.loaded.model, rows), rtol=0, atol=1e-6)
    if how == "full":
        config = json.loads((tmp_path / "result/config.json").read_bytes())
        assert config["architectures"] == [f"{architecture.capitalize()}ForCausalLM"]
        assert config["vocab_size"] == 1024  # never resized, though the tokenizer has fewer
    else:
        _is_servable(tmp_path / "result", str(tiny(architecture)))
    assert AutoTokenizer.from_pretrained(tmp_path / "result").chat_template


def _is_servable(result: Path, base: str) -> None:
    """What vLLM's PEFTHelper asks of an adapter."""
    config = json.loads((result / "adapter_config.json").read_bytes())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == base
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)
    assert not config.get("target_parameters")
    assert (config["r"], config["lora_alpha"]) == (16, 32)
