"""Rows, batches and steps; which parts of a job decide the weights."""

from __future__ import annotations

from typing import Any

import pytest

from aim_trainer.errors import JobError
from aim_trainer.job.digest import spec_digest
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.override import with_parameters
from aim_trainer.job.steps import Arithmetic, batches, largest_micro_batch, warmup_steps


def job(**spec: Any) -> FineTuningJob:
    base = {"baseModel": {"modelId": "org/model"}, "dataset": {"source": "chats.jsonl"}}
    return FineTuningJob.model_validate(
        {
            "apiVersion": "aim.amd.com/v1alpha1",
            "kind": "FineTuningJob",
            "metadata": {"name": "a"},
            "spec": {**base, **spec},
        }
    )


@pytest.mark.parametrize(
    ("hyper", "workers", "rows", "micro", "steps"),
    [
        ({"batchSize": 4}, 1, 100, None, Arithmetic(4, 1, 4, 25, 25)),
        ({"batchSize": 4, "globalBatchSize": 32}, 2, 100, None, Arithmetic(4, 4, 32, 4, 4)),
        ({"globalBatchSize": 32, "epochs": 2.5}, 2, 100, 2, Arithmetic(2, 8, 32, 4, 10)),
        ({"batchSize": 4, "maxSteps": 7, "epochs": 99}, 1, 100, None, Arithmetic(4, 1, 4, 25, 7)),
        ({"batchSize": 64, "epochs": 0.1}, 1, 3, None, Arithmetic(64, 1, 64, 1, 1)),
    ],
)
def test_the_arithmetic(hyper: dict[str, Any], workers: int, rows: int, micro: int | None, steps: Arithmetic) -> None:
    assert batches(job(hyperparameters=hyper, distributed={"workers": workers}), rows, micro) == steps


def test_what_does_not_divide_is_refused_with_the_arithmetic() -> None:
    asked = job(hyperparameters={"globalBatchSize": 32})
    with pytest.raises(JobError, match=r"32 rows a step do not divide by 3 rows × 1 workers = 3; write 30"):
        batches(asked, 100, 3)
    with pytest.raises(JobError, match="none was found yet"):
        batches(asked, 100)
    with pytest.raises(JobError, match="no rows to train on"):
        batches(asked, 0, 4)


@pytest.mark.parametrize(("most", "found"), [(1, 1), (5, 4), (7, 6), (12, 12), (100, 12)])
def test_a_micro_batch_that_is_found_divides_the_global_one(most: int, found: int) -> None:
    asked = job(hyperparameters={"globalBatchSize": 24}, distributed={"workers": 2})
    assert largest_micro_batch(asked, most) == found
    assert batches(asked, 100, found).global_batch == 24


def test_warmup_is_a_share_or_a_number_of_steps() -> None:
    assert warmup_steps(job(hyperparameters={"warmup": 0.03}), 100) == 3
    assert warmup_steps(job(hyperparameters={"warmup": 0.03}), 10) == 1
    assert warmup_steps(job(hyperparameters={"warmup": 10}), 100) == 10
    assert warmup_steps(job(hyperparameters={"warmup": 0}), 100) == 0


def test_a_step_is_left_after_the_warmup_whatever_share_it_is() -> None:
    """The first step of a warm-up has a rate of 0: a run of one step would train nothing."""
    assert warmup_steps(job(), 1) == 0
    assert warmup_steps(job(hyperparameters={"warmup": 0.99}), 2) == 1


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    asked = job(hyperparameters={"warmup": 25, "batchSize": 4})
    with pytest.raises(JobError, match=r"spec.hyperparameters.warmup: 25 steps, and the run has 25: none is left; wr"):
        batches(asked, 100)
    assert batches(asked, 101).steps == 26


SAME = [
    {"output": {"registry": "s3://models/b"}},
    {"resources": {"gpu": 8}},
    {"checkpoints": {"everySteps": 5}},
    {"hyperparameters": {"gradientCheckpointing": False, "globalBatchSize": 8}},
    {"hyperparameters": {"batchSize": 2, "globalBatchSize": 8}},
    {"hyperparameters": {"globalBatchSize": 8}, "distributed": {"workers": 4, "strategy": "fsdp2"}},
    {"hyperparameters": {"batchSize": 4}, "distributed": {"workers": 2}},
    {"hyperparameters": {"batchSize": 8}},
]
OTHER = [
    {"hyperparameters": {"globalBatchSize": 16}},
    {"hyperparameters": {"globalBatchSize": 8, "learningRate": 1e-5}},
    {"hyperparameters": {"globalBatchSize": 8, "epochs": 2}},
    {"hyperparameters": {"globalBatchSize": 8}, "method": "qlora"},
    {"hyperparameters": {"globalBatchSize": 8}, "dataset": {"source": "other.jsonl"}},
    {"hyperparameters": {"globalBatchSize": 8}, "baseModel": {"modelId": "org/model", "revision": "v2"}},
]


@pytest.mark.parametrize("spec", SAME)
def test_what_does_not_decide_the_weights_keeps_the_digest(spec: dict[str, Any]) -> None:
    base: dict[str, Any] = {"hyperparameters": {"globalBatchSize": 8}}
    assert spec_digest(job(**{**base, **spec})) == spec_digest(job(**base))


@pytest.mark.parametrize("spec", OTHER)
def test_what_decides_the_weights_changes_the_digest(spec: dict[str, Any]) -> None:
    assert spec_digest(job(**spec)) != spec_digest(job(hyperparameters={"globalBatchSize": 8}))


def test_a_trial_is_the_job_with_its_numbers() -> None:
    space = {"uniform": {"min": 4, "max": 64}}
    asked = job(search={"parameters": [{"name": "hyperparameters.loraRank", "searchSpace": space}]})
    trial = with_parameters(asked, {"hyperparameters.loraRank": 8.0, "hyperparameters.learningRate": 1e-3})
    assert (trial.spec.hyperparameters.lora_rank, trial.spec.search) == (8, None)
    with pytest.raises(JobError, match=r"hyperparameters\.loraRank: 8\.5: Input should be a valid integer"):
        with_parameters(asked, {"hyperparameters.loraRank": 8.5})


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_every_rank_has_one_that_vllm_serves(rank: int, served: int) -> None:
    assert job(hyperparameters={"loraRank": rank}).spec.hyperparameters.served_rank == served
