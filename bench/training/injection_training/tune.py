"""Fine-tunes the encoder's upper layers: one epoch on what the linear model finds hard and a part of the rest, then
one on harmless texts that this model still suspects, with a part of what came before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from injection_training.encoder import MASK, Classifier, batches, logits, padded

_TOKENS = 2_500  # a batch, padding included
_MASKED = 0.08  # of the tokens, so that no single word decides
_SMOOTHING = 0.015
_WEIGHT_DECAY = 0.02
_CLIP = 1.0
_HEAD_FASTER = 5.0
_LAST_RATE = 0.02


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of a window, the ends marked, and whether it attacks."""

    ids: Sequence[int]
    attack: bool


@dataclass(frozen=True, slots=True)
class Course:
    """How one run goes."""

    rate: float
    epochs: int
    warm_up: int
    seed: int


FIRST = Course(rate=2e-4, epochs=1, warm_up=60, seed=0)
SECOND = Course(rate=6e-5, epochs=1, warm_up=20, seed=1)


def train(model: Classifier, rows: Sequence[Row], course: Course) -> None:
    """Change the model; prints the mean loss every 50 batches."""
    random, masks = Random(course.seed), np.random.default_rng(course.seed)
    torch.manual_seed(course.seed)
    order = list(batches([len(row.ids) for row in rows], _TOKENS))
    optimizer = torch.optim.AdamW(_groups(model, course.rate))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rates(course, len(order) * course.epochs))
    losses: list[float] = []
    for _ in range(course.epochs):
        random.shuffle(order)
        model.train()
        for batch in order:
            losses.append(_step(model, [rows[at] for at in batch], masks, optimizer))
            schedule.step()
            if len(losses) % 50 == 0:
                print(f"  batch {len(losses)} of {len(order) * course.epochs}: {np.mean(losses[-50:]):.4f}", flush=True)


def suspected(model: Classifier, rows: Sequence[Sequence[int]], floor: float, most: int) -> Iterator[Row]:
    """The harmless rows that look most like attacks, from this logit on."""
    found = logits(model, rows)
    for at in np.argsort(-found, kind="stable")[:most].tolist():
        if found[at] > floor:
            yield Row(rows[at], attack=False)


def _step(
    model: Classifier, rows: Sequence[Row], masks: np.random.Generator, optimizer: torch.optim.Optimizer
) -> float:
    ids, present = padded([row.ids for row in rows])
    targets = torch.tensor([row.attack for row in rows]).float() * (1 - 2 * _SMOOTHING) + _SMOOTHING
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids.masked_fill(_hidden(masks, present), MASK), present)
    loss = functional.binary_cross_entropy_with_logits(found.float(), targets)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(_trained(model), _CLIP)
    optimizer.step()
    return float(loss.detach())


def _hidden(masks: np.random.Generator, present: Tensor) -> Tensor:
    chosen: NDArray[np.bool_] = masks.random(tuple(present.shape)) < _MASKED
    chosen[:, 0] = False
    return torch.from_numpy(chosen) & present


def _trained(model: Classifier) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _groups(model: Classifier, rate: float) -> list[dict[str, object]]:
    """Weights decay, biases and norms do not; the head, which starts from nothing, learns faster."""
    body = [(name, each) for name, each in model.named_parameters() if each.requires_grad and "head" not in name]
    return [
        {"params": [each for _, each in body if each.dim() > 1], "lr": rate, "weight_decay": _WEIGHT_DECAY},
        {"params": [each for _, each in body if each.dim() < 2], "lr": rate, "weight_decay": 0.0},
        {"params": list(model.head.parameters()), "lr": rate * _HEAD_FASTER, "weight_decay": _WEIGHT_DECAY / 2},
    ]


def _rates(course: Course, steps: int) -> Callable[[int], float]:
    return lambda step: min(1.0, (step + 1) / course.warm_up) * max(_LAST_RATE, 1 - step / steps)
