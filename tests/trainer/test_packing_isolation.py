"""Rows that share a sequence do not see each other: the model says of each what it says of it alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from aim_trainer.data.batches import Batches
from aim_trainer.data.tokens import Row, Tokens, write_tokens
from tiny_models import ARCHITECTURES, VOCABULARY

#: Some longer than the windows of mistral and gemma3, one of a single token.
LENGTHS = (50, 37, 21, 9, 4, 1)


def logits(model: Any, batch: Any, **more: Any) -> torch.Tensor:
    tensors = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
    given = {name: torch.from_numpy(value) for name, value in tensors.items() if value is not None}
    with torch.no_grad():
        return torch.Tensor(model(**given | more).logits)


def batches(tokens: Tokens, *, packing: bool) -> list[Any]:
    dealt = Batches(tokens, seed=0, global_batch=99, micro_batch=2, max_seq_length=64, packing=packing)
    return dealt.of(0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_have_the_logits_they_have_alone(
    tiny: Callable[[str], Path], tmp_path: Path, architecture: str, attention: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(architecture), attn_implementation=attention).eval()
    draw = np.random.default_rng(0)
    rows = [Row(draw.integers(3, VOCABULARY, n).astype(np.int32), np.ones(n, np.uint8)) for n in LENGTHS]
    write_tokens(tmp_path, rows, {})
    alone = {}
    for batch in batches(Tokens(tmp_path), packing=False):
        for number, said in enumerate(logits(model, batch, use_cache=False)):
            length = int(batch.attention_mask[number].sum())
            alone[tuple(batch.input_ids[number, :length].tolist())] = said[:length]
    compared, seen_through = 0, 0.0
    for batch in batches(Tokens(tmp_path), packing=True):
        packed = logits(model, batch, use_cache=False)
        ones = logits(model, batch, use_cache=False, attention_mask=torch.ones(batch.input_ids.shape, dtype=torch.long))
        for number in range(len(packed)):
            starts = [*np.flatnonzero(batch.position_ids[number] == 0).tolist(), batch.input_ids.shape[1]]
            for begin, end in pairwise(starts):
                row = tuple(batch.input_ids[number, begin:end].tolist())
                if row in alone:
                    torch.testing.assert_close(packed[number, begin:end], alone[row], atol=2e-5, rtol=1e-4)
                    seen_through = max(seen_through, float((ones[number, begin:end] - alone[row]).abs().max()))
                    compared += 1
    assert compared == len(LENGTHS)
    assert seen_through > 1e-3, "a mask of ones lets rows see each other: this test can fail"
