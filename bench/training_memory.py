"""What a step of the trainer's recipe takes, beside aim_profile's estimate: a process for each method, on the CPU.

    .venv-trainer/bin/python bench/training_memory.py [--model DIR] [--batch 4] [--context 256] [--methods lora,full]

Resident memory is counted from the moment the model is loaded, so that what loading took for itself does not count,
and with every large block given back when it is freed: glibc otherwise keeps freed ones up to 32 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = ("lora", "lora checkpointed", "qlora", "full", "full checkpointed")


def _spec(asked: dict[str, Any]) -> dict[str, Any]:
    method = asked["method"].split()[0]
    hyper: dict[str, Any] = {
        "batchSize": asked["batch"],
        "maxSeqLength": asked["context"],
        "precision": "fp32",
        "gradientCheckpointing": "checkpointed" in asked["method"],
    }
    return {
        "baseModel": {"modelId": asked["model"]},
        "dataset": {"source": "none.jsonl"},
        "method": method,
        "hyperparameters": hyper | ({} if method == "full" else {"loraRank": 8, "loraDropout": asked["dropout"]}),
    }


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _measure(asked: dict[str, Any]) -> None:
    """One forward and backward pass and an optimizer step; prints bytes as JSON."""
    import numpy as np
    import torch

    from aim_trainer.data.batches import Batch
    from aim_trainer.job.job import FineTuningJob
    from aim_trainer.recipe.loss import summed_loss
    from aim_trainer.recipe.model import load
    from aim_trainer.recipe.optimizer import make_optimizer
    from aim_trainer.recipe.weights import trained_weights

    torch.set_num_threads(1)
    job = FineTuningJob.model_validate(
        {
            "apiVersion": "aim.amd.com/v1alpha1",
            "kind": "FineTuningJob",
            "metadata": {"name": "memory"},
            "spec": _spec(asked),
        }
    )
    bare = _resident("VmRSS")
    loaded = load(job, "cpu")
    loaded.model.train()
    optimizer = make_optimizer(trained_weights(loaded.model), job.spec.hyperparameters)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak from here on
    shape = (asked["batch"], asked["context"])
    ids = np.random.default_rng(0).integers(100, 40_000, shape)
    labels = np.where(np.arange(shape[1]) % 2 == 1, ids, -100)
    places = np.broadcast_to(np.arange(shape[1]), shape).copy()
    batch = Batch(ids, labels, places, np.ones(shape, np.int64), int((labels != -100).sum()))
    for _ in range(2):  # moments are made in the first step, and stand beside activations in the second
        loss, _ = summed_loss(loaded.model, loaded, batch)
        (loss / batch.trained_tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(json.dumps({"bare": bare, "peak": _resident("VmHWM")}))


def _estimate(asked: dict[str, Any]) -> int:
    from aim_profile.models.load import load_model
    from aim_profile.sizing.training import Training, memory

    method = asked["method"].split()[0]
    training = Training.model_validate(
        {
            **{key: asked[key] for key in ("model", "batch", "context")},
            "method": method,
            "precision": "fp32",
            "gradient_checkpointing": "checkpointed" in asked["method"],
            "lora_rank": 8,
            "lora_dropout": asked["dropout"],
            "trained_share": 0.5,
        }
    )
    return memory(load_model(asked["model"]), training, on_cpu=True).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".models/smollm2-hf")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        _measure(json.loads(given.measure))
        return
    print(f"{'method':<20}{'measured MiB':>14}{'estimate MiB':>14}{'ratio':>8}   before the model: MiB")
    for method in given.methods.split(","):
        asked = {key: getattr(given, key) for key in ("model", "batch", "context", "dropout")} | {"method": method}
        command = [sys.executable, __file__, "--measure", json.dumps(asked)]
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
        told = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
        found = json.loads(told.splitlines()[-1])
        estimate, peak = _estimate(asked), found["peak"]
        print(
            f"{method:<20}{peak / 2**20:>14.0f}{estimate / 2**20:>14.0f}{estimate / peak:>8.2f}"
            f"   {found['bare'] / 2**20:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
