"""What a checkpoint holds, in files anyone can read: trained weights, the optimizer's, every worker's generators.

`weights.safetensors`, `optimizer.safetensors` (`<weight>.exp_avg` …), `rng-00000.safetensors` of each rank and
`state.json`. Weights are whole whatever they were sharded over, so any number of workers can go on from them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from aim_trainer.checkpoints.checkpoint import Checkpoint, CheckpointStore
from aim_trainer.errors import ResourceError, StoreError
from aim_trainer.metrics.records import Saved
from aim_trainer.scratch import scratch

from . import rng
from .weights import fill, gathered, trained_weights
from .workers import Workers

#: AdamW's own names.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    store: CheckpointStore,
    workers: Workers,
    model: Any,
    optimizer: torch.optim.Optimizer,
    step: int,
    metrics: dict[str, float],
) -> Saved | None:
    """Every worker calls it; the first writes, and is told what. Raises StoreError or ResourceError on all of them."""
    started = time.monotonic()
    trained = trained_weights(model)
    weights = gathered(trained, kept=workers.first)
    moments = gathered(_moments(trained, optimizer), kept=workers.first)
    states = workers.of_all(rng.state())
    saved = None
    with workers.together():
        if workers.first:
            with scratch() as directory:
                _write(directory, step, weights, moments, states)
                size = sum(file.stat().st_size for file in directory.iterdir())
                committed = store.save(step, directory, workers.world_size, metrics)
                store.prune()
            saved = Saved(step, committed.uri, size, time.monotonic() - started)
    return saved


def load_state(
    store: CheckpointStore, workers: Workers, model: Any, optimizer: torch.optim.Optimizer
) -> Checkpoint | None:
    """Goes on from the newest valid checkpoint, which is returned; None: there is none. Only the first worker reads."""
    found: Checkpoint | None = None
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    states: list[dict[str, torch.Tensor]] = []
    with workers.together(), scratch() as there:
        if workers.first and (found := store.newest_valid()) is not None:
            directory = store.fetch(found, there)
            weights = load_file(directory / "weights.safetensors")
            moments = load_file(directory / "optimizer.safetensors")
            states = [load_file(file) for file in sorted(directory.glob("rng-*.safetensors"))]
            _check_fit(found, trained_weights(model), weights)
    found = workers.of_first(found)
    if found is None:
        return None
    _fill(trained_weights(model), optimizer, found.step, weights, moments, first=workers.first)
    _restore(workers, workers.of_first(states), found.step)
    return found


def _write(
    directory: Path,
    step: int,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    states: list[dict[str, torch.Tensor]],
) -> None:
    try:
        save_file(weights, directory / "weights.safetensors")
        save_file(moments, directory / "optimizer.safetensors")
        for rank, state in enumerate(states):
            save_file(state, directory / f"rng-{rank:05d}.safetensors")
        (directory / "state.json").write_text(json.dumps({"step": step, "world_size": len(states)}))
    except (OSError, SafetensorError) as problem:
        raise ResourceError(
            f"no checkpoint of step {step}: {directory}: {problem}",
            field="TMPDIR",
            value=str(directory.parent),
            remedy="make room there, or set TMPDIR to where there is; checkpoints before it are whole",
        ) from problem


def _moments(trained: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[weight][moment] for name, weight in trained.items() for moment in _MOMENTS
    }


def _fill(
    trained: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    *,
    first: bool,
) -> None:
    for name, weight in trained.items():
        fill(weight, weights[name] if first else None)
        state = {"step": torch.tensor(float(step), device=weight.device)}
        for moment in _MOMENTS:
            state[moment] = torch.zeros_like(weight)
            fill(state[moment], moments[f"{name}.{moment}"] if first else None)
        optimizer.state[weight] = state


def _restore(workers: Workers, states: list[dict[str, torch.Tensor]], step: int) -> None:
    if len(states) == workers.world_size:
        rng.restore(states[workers.rank])
    else:  # Another number of workers draws other dropout; it must not be the same on two of them.
        rng.seed(step, workers.world_size, workers.rank)


def _check_fit(found: Checkpoint, trained: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    ours = {name: tuple(weight.shape) for name, weight in trained.items()}
    if ours != {name: tuple(weight.shape) for name, weight in weights.items()}:
        raise StoreError(
            f"{found.uri}: not the weights that this job trains",
            field="spec.checkpoints.uri",
            value=found.uri,
            remedy="set checkpoints.resume: never, or another uri",
        )
