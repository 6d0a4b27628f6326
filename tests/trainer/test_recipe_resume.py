"""A run that was stopped, wherever, goes on as if it had not been: the same losses to the last bit, and weights."""

from __future__ import annotations

import math
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from aim_trainer.data.tokens import Tokens
from aim_trainer.errors import ResourceError, StoreError, TrainerError
from aim_trainer.metrics.records import Note
from aim_trainer.recipe import rng
from aim_trainer.recipe.model import load
from aim_trainer.recipe.train import train
from aim_trainer.recipe.workers import Workers
from aim_trainer.worker import dealt
from tiny_runs import CopiedCheckpoints, Ran, Told, chat_tokens, run_tiny, tiny_job

Tiny = Callable[[str], Path]
STEPS = 7
#: Dropout, accumulation, packing and noise: all that draws, or depends on how rows were dealt.
HOW: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "loraDropout": 0.2, "globalBatchSize": 8, "batchSize": 2, "neftuneAlpha": 5.0},
    "packed": {"method": "lora", "loraDropout": 0.2, "packing": True, "globalBatchSize": 4, "batchSize": 2},
    "full": {"method": "full", "globalBatchSize": 8, "neftuneAlpha": 5.0, "gradientCheckpointing": True},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return chat_tokens(tmp_path_factory.mktemp("rows"), 40)


@pytest.fixture(scope="module", params=HOW)
def whole(request: pytest.FixtureRequest, tiny: Tiny, rows: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the job, a run of it that nothing stopped, its checkpoints: one of each step)."""
    job = tiny_job(tiny("llama"), maxSteps=STEPS, everySteps=1, **HOW[request.param])
    store = tmp_path_factory.mktemp("store")
    return job, run_tiny(job, rows, store), store


@pytest.mark.parametrize("taken", [1, 4, STEPS - 1, STEPS])
def test_losses_are_the_same_to_the_last_bit(whole: Any, rows: Tokens, tmp_path: Path, taken: int) -> None:
    job, uninterrupted, store = whole
    _copy_up_to(taken, store, tmp_path)
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    resumed = run_tiny(job, rows, tmp_path)
    assert [note.fields["step"] for note in resumed.told.records if isinstance(note, Note)] == [taken]
    assert resumed.told.losses == uninterrupted.told.losses[taken:]
    assert [step.grad_norm for step in resumed.told.steps] == [s.grad_norm for s in uninterrupted.told.steps[taken:]]
    assert resumed.outcome.step == STEPS
    _same_weights(resumed, uninterrupted)


def test_a_run_that_is_asked_to_stop_ends_its_step_and_saves(whole: Any, rows: Tokens, tmp_path: Path) -> None:
    job, uninterrupted, _ = whole
    asked = iter([False, False, True])
    stopped = run_tiny(job, rows, tmp_path, stop=lambda: next(asked))
    assert (stopped.outcome.step, stopped.outcome.stopped) == (3, True)
    resumed = run_tiny(job, rows, tmp_path)
    assert stopped.told.losses + resumed.told.losses == uninterrupted.told.losses


def test_to_measure_disturbs_nothing(whole: Any, rows: Tokens, tmp_path: Path) -> None:
    job, uninterrupted, _ = whole
    measured = run_tiny(job, rows, tmp_path / "store", validation=chat_tokens(tmp_path / "held", 6, seed=5))
    assert measured.told.losses == uninterrupted.told.losses
    at = [evaluation.step for evaluation in measured.told.evaluations]
    assert (at[0], at[-1]) == (0, STEPS)
    assert len(at) > 2  # once an epoch, too


def test_resume_never_begins_anew(whole: Any, rows: Tokens, tmp_path: Path) -> None:
    job, uninterrupted, store = whole
    shutil.copytree(store / "000003-1", tmp_path / "000099-1")
    spec = job.spec.model_copy(update={"checkpoints": job.spec.checkpoints.model_copy(update={"resume": "never"})})
    anew = run_tiny(job.model_copy(update={"spec": spec}), rows, tmp_path)
    assert anew.told.losses == uninterrupted.told.losses


def test_weights_of_another_model_are_refused(whole: Any, rows: Tokens, tmp_path: Path) -> None:
    job, _, store = whole
    _copy_up_to(1, store, tmp_path)
    file = tmp_path / "000001-1/weights.safetensors"
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file)
    with pytest.raises(StoreError, match=r"not the weights that this job trains.*set checkpoints.resume: never"):
        run_tiny(job, rows, tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_was_saved(
    tiny: Tiny, rows: Tokens, tmp_path: Path
) -> None:
    job = tiny_job(tiny("llama"), everySteps=1, maxSteps=5)
    loaded, calls = load(job), iter(range(5))

    def breaks_in_the_second_step() -> bool:
        if next(calls) == 1:
            torch.nn.init.constant_(loaded.model.get_input_embeddings().weight, math.nan)
        return False

    store, told = CopiedCheckpoints(tmp_path), Told()
    with pytest.raises(TrainerError, match=r"^step 3: loss nan; .*lower learningRate") as problem:
        train(job, loaded, dealt(job, rows), None, Workers(), store, told, breaks_in_the_second_step)
    assert problem.value.field == "spec.hyperparameters.learningRate"
    assert [step.step for step in told.steps] == [1, 2]
    files = sorted(tmp_path.rglob("weights.safetensors"))
    assert [file.parent.name for file in files] == ["000001-1", "000002-1"]
    assert all(bool(weight.isfinite().all()) for file in files for weight in load_file(file).values())


def test_generators_go_on_where_they_were() -> None:
    rng.seed(1, 2, 3)
    random.gauss(0, 1)  # leaves a second value behind
    np.random.normal()
    kept = rng.state()
    drawn = [(random.gauss(0, 1), np.random.normal(), float(torch.rand(()))) for _ in range(3)]
    rng.seed(4)
    rng.restore(kept)
    assert [(random.gauss(0, 1), np.random.normal(), float(torch.rand(()))) for _ in range(3)] == drawn
    assert all(math.isfinite(each) for each in drawn[0])


def _copy_up_to(taken: int, store: Path, into: Path) -> None:
    for directory in store.iterdir():
        if int(directory.name.partition("-")[0]) <= taken:
            shutil.copytree(directory, into / directory.name)


def _same_weights(one: Ran, other: Ran) -> None:
    theirs = dict(other.loaded.model.named_parameters())
    for name, weight in one.loaded.model.named_parameters():
        assert torch.equal(weight, theirs[name]), name


def test_a_full_disk_is_told_and_what_was_saved_stays(tiny: Tiny, rows: Tokens, tmp_path: Path) -> None:
    """The second checkpoint meets a limit on the size of files."""
    job, allowed = tiny_job(tiny("llama"), everySteps=1, maxSteps=3), iter([False])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def disk_fills_up() -> bool:
        if next(allowed, True):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return False

    try:
        with pytest.raises(ResourceError, match=r"^no checkpoint of step 2: .*make room there, or set TMPDIR"):
            run_tiny(job, rows, tmp_path, stop=disk_fills_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run_tiny(job, rows, tmp_path).told.steps[0].step == 2


def test_a_device_that_is_out_of_memory_is_told_with_a_remedy(tiny: Tiny, rows: Tokens, tmp_path: Path) -> None:
    def out_of_memory() -> bool:
        raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB")

    with pytest.raises(ResourceError, match=r"^step 1: cpu is out of memory.*lower batchSize"):
        run_tiny(tiny_job(tiny("llama")), rows, tmp_path, stop=out_of_memory)
