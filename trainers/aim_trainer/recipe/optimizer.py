"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and how its learning rate goes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from aim_trainer.job.hyperparameters import Hyperparameters
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.steps import warmup_steps


def make_optimizer(weights: Mapping[str, torch.Tensor], hyperparameters: Hyperparameters) -> torch.optim.Optimizer:
    """Decay is of matrices alone: norms and biases have one dimension and are not decayed."""
    matrices = [weight for weight in weights.values() if weight.dim() > 1]
    others = [weight for weight in weights.values() if weight.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": hyperparameters.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=hyperparameters.learning_rate,
        betas=(hyperparameters.adam_beta1, hyperparameters.adam_beta2),
        eps=hyperparameters.adam_epsilon,
        fused=True,
    )


def learning_rate(job: FineTuningJob, step: int, steps: int) -> float:
    """Of the step after `step` others: up in a line over the warm-up's steps, then down to nothing by the schedule.

    As transformers' get_cosine_schedule_with_warmup and its linear and constant kin.
    """
    hyperparameters, warmup = job.spec.hyperparameters, warmup_steps(job, steps)
    highest = hyperparameters.learning_rate
    if step < warmup:
        return highest * step / warmup
    if hyperparameters.schedule == "constant":
        return highest
    done = (step - warmup) / max(1, steps - warmup)
    if hyperparameters.schedule == "linear":
        return highest * max(0.0, 1 - done)
    return highest * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
