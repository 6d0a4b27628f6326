"""Two workers of one run, as processes of their own that speak gloo: several runs in turn, what each told as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from aim_trainer.data.tokens import Tokens
from aim_trainer.errors import TrainerError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.recipe.model import save
from aim_trainer.recipe.weights import trained_weights
from aim_trainer.recipe.workers import Workers
from forked import together
from tiny_runs import run_tiny


def run_together(runs: dict[str, dict[str, Any]], directory: Path, world_size: int = 2) -> dict[str, list[Any]]:
    """What each rank told of each run. A run: `job` (its fields), `tokens`, `validation` (directories or None), `stop`
    ([rank, step] of a worker that is asked to stop), `result` (where it is saved), `store`.
    """
    outs = [directory / f"out-{rank}.json" for rank in range(world_size)]
    meeting = f"file://{directory / 'rendezvous'}"
    assert together(_work, [(rank, world_size, meeting, runs, outs[rank]) for rank in range(world_size)])
    told = [json.loads(out.read_bytes()) for out in outs]
    return {name: [each[name] for each in told] for name in runs}


def _work(rank: int, world_size: int, meeting: str, runs: dict[str, dict[str, Any]], out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    workers = Workers(rank, world_size, rank)
    told = {name: _told(run, workers) for name, run in runs.items()}
    dist.destroy_process_group()
    out.write_text(json.dumps(told))
    os._exit(0)  # what torch has at its end takes a second


def _told(run: dict[str, Any], workers: Workers) -> dict[str, Any]:
    rank, step = run.get("stop") or (-1, 0)
    asked = iter(range(1, 1000))
    stop = lambda: next(asked) == step if workers.rank == rank else False  # noqa: E731
    tokens, held = Tokens(Path(run["tokens"])), run.get("validation")
    try:
        job = FineTuningJob.model_validate(run["job"])
        ran = run_tiny(job, tokens, Path(run["store"]), Tokens(Path(held)) if held else None, workers, stop)
    except TrainerError as problem:
        return {"problem": f"{type(problem).__name__}: {problem}"}
    if "result" in run:
        save(ran.loaded, Path(run["result"]), workers)
    weights = trained_weights(ran.loaded.model).values()
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return {
        "losses": ran.told.losses,
        "norms": [step.grad_norm for step in ran.told.steps],
        "tokens": [step.tokens for step in ran.told.steps],
        "evaluations": [evaluation.metrics for evaluation in ran.told.evaluations],
        "saved": [saved.step for saved in ran.told.saved],
        "step": ran.outcome.step,
        "stopped": ran.outcome.stopped,
        "metrics": ran.outcome.metrics,
        "sharded": all(isinstance(weight, DTensor) for weight in weights),
        "local_elements": sum(weight.numel() for weight in local),
        "elements": sum(weight.numel() for weight in weights),
    }
