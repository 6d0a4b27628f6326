"""Random tiny models of each architecture, as Hugging Face directories, with a tokenizer that has a chat template.

Real parts in small: the library's own classes with their own configurations, two layers of width 64. A test that needs
words, not shapes, takes the embedded model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

#: Ids as the tokenizer below gives them.
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
PAD_ID, START_ID, END_ID = 0, 1, 2
VOCABULARY = 1024
MAX_POSITIONS = 512

#: ChatML. What the assistant says is marked for the loss, its end included.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": PAD_ID,
    "bos_token_id": START_ID,
    "eos_token_id": END_ID,
}
#: Name → its configuration. Mistral and Gemma have windows shorter than some rows of the tests.
ARCHITECTURES: dict[str, Any] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": 32}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
    "phi3": (Phi3Config, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def write_tiny_model(architecture: str, directory: Path, seed: int = 0) -> Path:
    """The directory, with `config.json`, `model.safetensors` and the tokenizer's files: the same bytes each time."""
    kind, own = ARCHITECTURES[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(kind(**_SHAPE | own), dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,024 pieces; pad, start and end are tokens of their own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Short questions with answers that can be learned: who has how many of what, where."""
    chance = random.Random(seed)
    return [_conversation(chance) for _ in range(count)]


def _conversation(chance: random.Random) -> list[dict[str, str]]:
    name, thing, town = (chance.choice(words) for words in (_NAMES, _THINGS, _TOWNS))
    number = chance.randint(2, 99)
    turns = [
        {"role": "user", "content": f"How many {thing} does {name} have in {town}?"},
        {"role": "assistant", "content": f"{name} has {number} {thing} in {town}."},
    ]
    if chance.random() < 0.4:
        turns += [
            {"role": "user", "content": f"And where do the {thing} come from?"},
            {"role": "assistant", "content": f"The {thing} of {name} come from {chance.choice(_TOWNS)}."},
        ]
    return turns


def _corpus() -> Iterator[str]:
    for turns in conversations(600, seed=1):
        for turn in turns:
            yield f"{turn['role']}\n{turn['content']}\n"
    yield "".join(f"{first}{second} " for first in "abcdefghijklmnopqrstuvwxyz" for second in "aeiounrstl")


_NAMES = ("Ada", "Bert", "Cleo", "Dora", "Emil", "Frida", "Gus", "Hanna", "Ivan", "Julia", "Karl", "Lena")
_THINGS = ("stones", "apples", "books", "lamps", "letters", "marbles", "pens", "shells", "coins", "keys")
_TOWNS = ("Paris", "Lisbon", "Turku", "Bergen", "Ghent", "Porto", "Sofia", "Trento", "Uppsala", "Vienna")
