"""The base model and the tuned one, one after the other, in as little memory as that takes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from aim_trainer.errors import StoreError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.recipe.model import Loaded, load
from aim_trainer.recipe.weights import trained_weights

ADAPTER = "adapter_model.safetensors"
Side = tuple[Literal["base", "tuned"], Loaded]


def sides(job: FineTuningJob, result: Path, device: str) -> Iterator[Side]:
    """base, then tuned. An adapter is switched off for the former, so that one model is loaded; of method full there
    are two, never both at once.

    Raises StoreError: `result` does not hold what this job trains. JobError: the base model cannot be loaded.
    """
    if not result.is_dir():
        raise _missing(result, "there is no result yet", "run or resume the job first")
    loaded = load(job, device)
    if loaded.has_adapter:
        _fill(loaded, result / ADAPTER)
        with loaded.model.disable_adapter():
            yield "base", loaded
        yield "tuned", loaded
        return
    yield "base", loaded
    del loaded
    gc.collect()
    yield "tuned", load(_whole(job, result), device)


def _fill(loaded: Loaded, file: Path) -> None:
    try:
        weights = load_file(file)
    except (OSError, ValueError) as problem:
        raise _missing(file, str(problem), "run or resume the job first") from None
    found = set_peft_model_state_dict(loaded.model, weights)
    wanted, strange = len(trained_weights(loaded.model)), len(found.unexpected_keys)
    if strange or len(weights) != wanted:
        why = f"{len(weights)} tensors, {strange} of which name nothing in the model; it has {wanted}"
        raise _missing(file, why, "judge it with the job it was trained by")


def _whole(job: FineTuningJob, result: Path) -> FineTuningJob:
    """The job with the result as its base model."""
    base = job.spec.base_model.model_copy(update={"model_id": str(result.absolute()), "revision": None})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"base_model": base})})


def _missing(path: Path, why: str, remedy: str) -> StoreError:
    return StoreError(f"{path}: {why}", field=str(path), remedy=remedy)
