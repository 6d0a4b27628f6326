"""The state of every random generator of a process, as plain tensors: nothing of a checkpoint is unpickled."""

from __future__ import annotations

import random

import numpy as np
import torch


def state() -> dict[str, torch.Tensor]:
    """Of python, numpy, torch, and the GPU of this process where it has one."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert (version, kind) == (3, "MT19937")  # else there is more to keep than this
    states = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, torch.Tensor]) -> None:
    """The inverse of `state`."""
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed(*numbers: int) -> None:
    """Seeds all of them from a tuple, so that each worker and each step of a changed world has a stream of its own."""
    drawn = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(drawn[0]))
    np.random.seed(int(drawn[1]))
    torch.manual_seed(int(drawn[2]))
