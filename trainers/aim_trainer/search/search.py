"""From a job with a search to its best values."""

from __future__ import annotations

import os

from aim_trainer.errors import JobError, StoreError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import as_yaml
from aim_trainer.recipe.base import read_tokenizer
from aim_trainer.run_directory import RunDirectory
from aim_trainer.runner import connect

from .asked import search_of
from .results import Found, found_of, write_results
from .trial import Given, prepared, trial_job


def search(job: FineTuningJob, directory: RunDirectory) -> Found:
    """Tries what the job asks, each trial a run in `directory`/trials, and writes the results there.

    Raises TrainerError before anything is started: no search, data that is not to be trained on; afterwards only for
    what would stop every trial.
    """
    search_of(job)
    _check_batch(job)
    root = directory.root
    if (root / "results.json").exists() or (root / "trials").exists():
        raise StoreError(
            f"{root}: holds a search already", field="directory", value=str(root), remedy="name another directory"
        )
    root.mkdir(parents=True, exist_ok=True)
    directory.job.write_text(as_yaml(job), encoding="utf-8")
    read_tokenizer(job.spec.base_model).save_pretrained(directory.tokenizer)
    prepared(trial_job(job, {}), root)
    connect(trial_job(job, {}))
    from .tuner import tried

    found = found_of(job, tried(Given(job, root.absolute(), os.getcwd())))
    write_results(job, root, found)
    return found


def _check_batch(job: FineTuningJob) -> None:
    """Trials are compared: what fits on a device must not decide how many rows a step has."""
    hyper = job.spec.hyperparameters
    if hyper.batch_size == "auto" and hyper.global_batch_size is None:
        field = "spec.hyperparameters.batchSize"
        raise JobError(
            f"{field}: auto, and trials must not differ in their batch",
            field=field,
            value="auto",
            remedy="set globalBatchSize, or batchSize to a number",
        )
