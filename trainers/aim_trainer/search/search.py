"""From a job with a search to its best values."""

from __future__ import annotations

import os

from aim_trainer.errors import JobError, StoreError
from aim_trainer.files import write_whole
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import as_yaml, read_job
from aim_trainer.places.directory import local_errors
from aim_trainer.run import keep_tokenizer
from aim_trainer.run_directory import RunDirectory
from aim_trainer.runner import check, connect
from aim_trainer.stopping import alone

from .asked import search_of
from .results import Found, found_of, write_results
from .trial import Given, prepared, trial_job


def search(job: FineTuningJob, directory: RunDirectory) -> Found:
    """Tries what the job asks, each trial a run in `directory`/trials, and writes the results there. A search that was
    killed goes on: trials that ended stay, those at work from their newest checkpoint.

    Raises TrainerError before anything is started: no search, data that is not to be trained on; afterwards only for
    what would stop every trial.
    """
    search_of(job)
    _check_batch(job)
    one = trial_job(job, {})
    check(one, ray=True)
    root = directory.root.absolute()
    with local_errors(root), alone(directory):
        _begin(job, directory)
        keep_tokenizer(job, directory)
        prepared(one, root)
        connect(one)
        from .tuner import tried

        found = found_of(job, tried(Given(job, root, os.getcwd())))
        write_results(job, root, found)
        return found


def _begin(job: FineTuningJob, directory: RunDirectory) -> None:
    """Keeps the job, for who goes on. Raises StoreError: a search that is done, or of another job."""
    root = directory.root
    if (root / "results.json").exists():
        why = "holds a search that is done"
    elif directory.job.is_file() and read_job(directory.job) != job:
        why = "holds a search, or a run, of another job"
    else:
        write_whole(directory.job, as_yaml(job).encode())
        return
    raise StoreError(f"{root}: {why}", field="directory", value=str(root), remedy="name another directory")


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
