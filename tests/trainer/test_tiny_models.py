"""The tiny models that other tests train: of the architecture they are named after, the same each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tiny_models import ARCHITECTURES, END_ID, PAD_ID, conversations, write_tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_is_of_its_architecture(tiny: Callable[[str], Path], architecture: str) -> None:
    config = json.loads((tiny(architecture) / "config.json").read_bytes())
    assert config["architectures"] == [f"{architecture.capitalize()}ForCausalLM"]


def test_the_same_model_each_time(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    again = write_tiny_model("llama", tmp_path)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (tiny("llama") / name).read_bytes()


def test_the_template_marks_what_the_assistant_says(tiny: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    (turns,) = conversations(1)
    row = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, trained in zip(row["input_ids"], row["assistant_masks"], strict=True) if trained]
    answers = "".join(turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant")
    assert tokenizer.decode(said) == answers
    assert said[-1] == END_ID == tokenizer.eos_token_id != PAD_ID == tokenizer.pad_token_id
