"""One trial: a run of its own in a directory of its own, in this very process, told to Ray Tune as it goes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aim_trainer.data.prepare import prepare
from aim_trainer.data.tokens import Tokens
from aim_trainer.job.job import Distributed, FineTuningJob
from aim_trainer.job.override import with_parameters
from aim_trainer.job.read import as_yaml
from aim_trainer.metrics import sinks
from aim_trainer.metrics.records import Evaluation, Record, Sink, Step
from aim_trainer.recipe.train import total_steps
from aim_trainer.recipe.workers import Workers
from aim_trainer.run_directory import RunDirectory
from aim_trainer.runner import device_of
from aim_trainer.worker import Rows, dealt, work

from .asked import search_of

#: How often a trial is measured where the job does not say: enough to tell early, and a small part of its time.
_MEASURES = 10


@dataclass(frozen=True, slots=True)
class Given:
    """What all trials have in common. root: the search's directory; directory: where paths of the job are from."""

    job: FineTuningJob
    root: Path
    directory: str

    def run(self, trial: str) -> RunDirectory:
        return RunDirectory(self.root / "trials" / trial)


def trial_job(job: FineTuningJob, values: dict[str, Any]) -> FineTuningJob:
    """The job with those values, trained by one worker with the batch of all. Raises JobError.

    Only what decides the weights is kept as it is: checkpoints and results stay in the trial's own directory.
    """
    made = with_parameters(job, values)
    spec = made.spec
    hyper, workers = spec.hyperparameters, spec.distributed.workers
    if workers > 1 and hyper.global_batch_size is None and isinstance(hyper.batch_size, int):
        hyper = hyper.model_copy(update={"global_batch_size": hyper.batch_size * workers})
    update = {
        "hyperparameters": hyper,
        "distributed": Distributed(),
        "checkpoints": spec.checkpoints.model_copy(update={"uri": None, "keep_last": 1, "keep_best": None}),
    }
    raw = made.model_copy(update={"spec": spec.model_copy(update=update)}).model_dump(
        mode="json", by_alias=True, exclude_unset=True
    )
    return FineTuningJob.model_validate(raw)


def prepared(job: FineTuningJob, root: Path) -> Rows:
    """The trial's rows: tokenised once for all trials whose data is the same."""
    found = prepare(job, RunDirectory(root).tokenizer, root / "data")
    return Rows(found.train, found.validation, found.digest)


def run_trial(given: Given, trial: str, values: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Trains to the end, or until `report` does not come back. Raises TrainerError."""
    if Path(given.directory).is_dir():
        os.chdir(given.directory)
    run = given.run(trial)
    job = trial_job(given.job, values)
    rows = prepared(job, given.root)
    job = _measured(job, _steps(job, rows))
    run.root.mkdir(parents=True, exist_ok=True)
    run.job.write_text(as_yaml(job), encoding="utf-8")
    told = _Told(sinks.of(job, run, rank=0), given.job, report)
    work(job, run, rows, Workers(device=device_of(job)), lambda: False, told)
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # as large as the model, and nothing goes on from them


def _steps(job: FineTuningJob, rows: Rows) -> int:
    """As many as the trial will take: an epoch has packed sequences, and rows by their weights."""
    return total_steps(job.spec.hyperparameters, dealt(job, Tokens(rows.train)).steps_per_epoch)


def _measured(job: FineTuningJob, steps: int) -> FineTuningJob:
    """With an interval of measures where the job has none; measuring changes no weight."""
    if job.spec.validation.every_steps is not None:
        return job
    every = max(1, -(-steps // _MEASURES))
    validation = job.spec.validation.model_copy(update={"every_steps": every})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"validation": validation})})


class _Told:
    """The trial's own sinks, and `report`: each measure after a step as soon as it is taken. Where nobody wants to hear
    more, `report` does not come back.
    """

    def __init__(self, sink: Sink, job: FineTuningJob, report: Callable[[dict[str, Any]], None]) -> None:
        self._sink, self._metric, self._report = sink, search_of(job).objective.metric, report
        self._devices = max(1, job.spec.resources.gpu)
        self._seconds, self._steps = 0.0, 1

    def tell(self, record: Record) -> None:
        self._sink.tell(record)
        match record:
            case Step():
                self._seconds, self._steps = self._seconds + record.seconds, record.steps
            case Evaluation(step=step, metrics=metrics) if step and self._metric in metrics:
                # Of the trial's own steps: trials may have different numbers of them.
                told_of = {"step": step, "percent": 100 * step // self._steps}
                self._report({**metrics, **told_of, "gpu_hours": self._seconds * self._devices / 3600})

    def close(self) -> None:
        self._sink.close()
