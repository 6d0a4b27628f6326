"""The loss of one micro-batch, as a sum: dividing is the caller's, who knows the whole global batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from aim_trainer.data.batches import UNTRAINED, Batch

from .model import Loaded


def summed_loss(forward: Any, loaded: Loaded, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(Cross-entropy summed over what is trained of the batch; logits of it: (n, vocabulary), or (b, classes)).

    forward: the model as it was placed. Cross-entropy is taken in float32.
    """
    with torch.autocast(loaded.device.partition(":")[0], loaded.compute, enabled=loaded.compute != torch.float32):
        if batch.classes is not None:
            logits = forward(**_inputs(batch, loaded.device)).logits
            wanted = torch.from_numpy(batch.classes).to(loaded.device)
        else:
            labels = torch.from_numpy(batch.labels).to(loaded.device)
            # Each position says the next token; the last one says nothing that is known.
            following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=UNTRAINED)
            trained = following != UNTRAINED
            wanted = following[trained]
            with _head_sees(loaded.model.get_output_embeddings(), trained):
                logits = forward(**_inputs(batch, loaded.device)).logits
    return cross_entropy(logits.float(), wanted, ignore_index=UNTRAINED, reduction="sum"), logits


@contextmanager
def _head_sees(head: torch.nn.Module, trained: torch.Tensor) -> Iterator[None]:
    """Inside, the head is given the positions alone that are trained: the most of a step's memory, and with a large
    vocabulary much of its time, would go to logits that nobody asks for.
    """
    hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][trained], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _inputs(batch: Batch, device: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(batch.input_ids).to(device), "use_cache": False}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = torch.from_numpy(batch.attention_mask).to(device)
    else:
        # Packed rows: attention is told by the positions alone; with a mask, or a cache, rows would see each other.
        inputs["position_ids"] = torch.from_numpy(batch.position_ids).to(device)
    return inputs
