"""How well a model says rows it was never trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from aim_trainer.data.batches import UNTRAINED, Batch, Batches, Share
from aim_trainer.data.tokens import Tokens

from .loss import summed_loss
from .model import Loaded
from .weights import let_go
from .workers import Workers

#: Micro-batches of a worker that are put together at once.
_TURNS = 16


def held_out(loaded: Loaded, tokens: Tokens, micro_batch: int = 8, workers: Workers | None = None) -> dict[str, float]:
    """eval_loss (nats per trained token; of a classification, per row) and perplexity, or accuracy and f1 (macro).

    All workers call it and are told the same. Nothing is drawn: no dropout, no noise, no generator moves.
    """
    workers = workers or Workers()
    rows = _rows(tokens, micro_batch, workers, loaded.tokenizer.pad_token_id)
    training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.no_grad():
            total, count, pairs = _measured(loaded, rows)
    finally:
        loaded.model.train(training)
        let_go(loaded.model)
    summed, rated = workers.sums(total, count)
    loss = summed / rated
    if "labels" not in tokens.about and not pairs:
        return {"eval_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    return {"eval_loss": loss} | judged([pair for said in workers.of_all(pairs) for pair in said])


def judged(pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    """accuracy and macro F1 of (class, predicted class), over the classes that occur in either."""
    classes = sorted({each for pair in pairs for each in pair})
    right = {each: sum(pair == (each, each) for pair in pairs) for each in classes}
    named = {each: sum((pair[0] == each) + (pair[1] == each) for pair in pairs) for each in classes}
    return {
        "accuracy": sum(right.values()) / len(pairs),
        "f1": sum(2 * right[each] / named[each] for each in classes) / len(classes),
    }


def _rows(tokens: Tokens, micro_batch: int, workers: Workers, pad_id: int) -> Batches:
    return Batches(
        tokens,
        seed=0,
        global_batch=micro_batch * workers.world_size * _TURNS,
        micro_batch=micro_batch,
        max_seq_length=int(tokens.lengths().max()),
        world_size=workers.world_size,
        rank=workers.rank,
        shares=[Share(len(tokens))],
        pad_id=pad_id,
    )


def _measured(loaded: Loaded, rows: Batches) -> tuple[float, int, list[tuple[int, int]]]:
    total, count = 0.0, 0
    pairs: list[tuple[int, int]] = []
    for step in range(rows.steps_per_epoch):
        for batch in rows.of(step):
            loss, logits = summed_loss(loaded.model, loaded, batch)
            total += float(loss)
            count += batch.trained_tokens
            pairs += _pairs(batch, logits)
    return total, count, pairs


def _pairs(batch: Batch, logits: torch.Tensor) -> list[tuple[int, int]]:
    if batch.classes is None:
        return []
    said = logits.argmax(dim=-1).tolist()
    return [(right, own) for right, own in zip(batch.classes.tolist(), said, strict=True) if right != UNTRAINED]
