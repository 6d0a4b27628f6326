"""What a model answers when it always says the likeliest token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from aim_trainer.recipe.model import Loaded

#: Prompts of like length that are answered side by side.
AT_ONCE = 8


def answers(loaded: Loaded, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """One for each prompt, in order, without special tokens; ended by the model or after `max_new_tokens`.

    What a batch is made of changes a greedy answer by rounding at most.
    """
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    said = [""] * len(prompts)
    training = loaded.model.training
    loaded.model.eval()
    try:
        for first in range(0, len(order), AT_ONCE):
            some = order[first : first + AT_ONCE]
            for at, text in zip(some, _batch(loaded, [prompts[at] for at in some], max_new_tokens), strict=True):
                said[at] = text
    finally:
        loaded.model.train(training)
    return said


def _batch(loaded: Loaded, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Padded on the left, so that every answer begins where its prompt ends."""
    tokenizer = loaded.tokenizer
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for at, prompt in enumerate(prompts):
        ids[at, longest - len(prompt) :] = torch.tensor(prompt)
        mask[at, longest - len(prompt) :] = 1
    with torch.no_grad(), torch.autocast(loaded.device.partition(":")[0], loaded.compute, _mixed(loaded)):
        generated = loaded.model.generate(
            input_ids=ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            generation_config=GenerationConfig(
                do_sample=False,
                use_cache=True,
                max_new_tokens=min(max_new_tokens, _room(loaded.model, longest)),
                eos_token_id=_ends(loaded),
                pad_token_id=tokenizer.pad_token_id,
            ),
        )
    return [text.strip() for text in tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)]


def _mixed(loaded: Loaded) -> bool:
    """Trained weights are float32 beside others in bfloat16: then products are made in the latter, as in training."""
    return bool(loaded.compute != torch.float32)


def _ends(loaded: Loaded) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those the model's own configuration names."""
    named: Any = loaded.model.generation_config.eos_token_id
    own = named if isinstance(named, list) else [named]
    return sorted({token for token in (*own, loaded.tokenizer.eos_token_id) if token is not None})


def _room(model: Any, asked: int) -> int:
    """Tokens that the model has positions for, after so many; 1 at least."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return max(1, positions - asked) if positions else 1 << 30
