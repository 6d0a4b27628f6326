"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

from typing import Any

import torch


def add_noise(model: Any, alpha: float) -> None:
    """From now on, in training mode, each embedded row gets uniform noise of ±alpha / √(tokens × width)."""

    def noisy(module: torch.nn.Module, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        span = alpha / (embedded.shape[-2] * embedded.shape[-1]) ** 0.5
        return embedded + torch.empty_like(embedded).uniform_(-span, span)

    model.get_input_embeddings().register_forward_hook(noisy)
