"""A run from its job to what is served: data, training, judgement, publication, the page."""

from __future__ import annotations

import shutil
import signal
from contextlib import suppress
from pathlib import Path

from aim_trainer import runner
from aim_trainer.data.masked import marked, stretches
from aim_trainer.data.prepare import Prepared, prepare
from aim_trainer.data.tokens import Tokens
from aim_trainer.errors import JobError, StoreError, TrainerError
from aim_trainer.evaluate.gates import require
from aim_trainer.evaluate.judge import Judgement, judge, prompts_of
from aim_trainer.files import write_whole
from aim_trainer.job.digest import spec_digest
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import as_yaml, read_job
from aim_trainer.metrics import sinks
from aim_trainer.metrics.records import Note
from aim_trainer.places.directory import local_errors
from aim_trainer.places.patience import PATIENCE_S
from aim_trainer.publish.beforehand import LOOKS_S, check_places
from aim_trainer.publish.publish import publish
from aim_trainer.recipe.base import read_tokenizer
from aim_trainer.report.write import write_report
from aim_trainer.run_directory import RunDirectory
from aim_trainer.stopping import Stopped, Stopping, alone, stopping
from aim_trainer.worker import Rows

#: What a process ends with that a signal asked to stop.
PAUSED = 128 + signal.SIGTERM
#: Of a row that is shown: enough to see whose words are trained.
_SAMPLE_CHARACTERS = 600


def run(job: FineTuningJob, directory: RunDirectory, *, ray: bool) -> int:
    """Begins a run, or goes on with it from its newest valid checkpoint. Returns 0; PAUSED when it was asked to stop.

    Raises TrainerError: GateError when all is trained and judged and a gate failed; nothing is published then.
    """
    _refuse_suspended(job)
    runner.check(job, ray=ray)
    prompts_of(job)  # what is wrong in them is told before hours of training
    check_places(job, PATIENCE_S if directory.job.is_file() else LOOKS_S)  # so are places that cannot be written to
    with local_errors(directory.root), alone(directory), stopping(directory.stop) as stop:
        _begin(job, directory)
        try:
            _through(job, directory, stop, ray=ray)
        except Stopped as stopped:
            fields: dict[str, object] = {} if stopped.step is None else {"step": stopped.step}
            _tell(directory, Note("paused", f"paused {stopped}; resume goes on", fields))
            _report(directory)
            return PAUSED
        except TrainerError as failed:
            sinks.kept(directory).tell(Note("failed", str(failed)))
            with suppress(StoreError):  # of a full disk: what failed is what is told
                _report(directory)
            raise
        _report(directory)
        return 0


def _through(job: FineTuningJob, run: RunDirectory, stop: Stopping, *, ray: bool) -> None:
    """Raises Stopped."""
    with stop.at_once("before its first step"):
        rows = _rows(job, run)
    outcome = runner.train(job, run, rows, ray=ray)
    if outcome.stopped:
        raise Stopped(f"after step {outcome.step}", outcome.step)
    with stop.at_once("before it was judged"):
        judgement = runner.call(job, _judge, job, run, rows.validation, ray=ray)
    _report(run)
    require(judgement.gates)
    with stop.at_once("before it was published"):
        published = publish(job, run)
    profile = str(published.profile) if published.profile else None
    fields: dict[str, object] = {"uri": published.uri, "digest": published.digest, "profile": profile}
    _tell(run, Note("done", f"published {published.uri}", fields))


def _refuse_suspended(job: FineTuningJob) -> None:
    if job.spec.suspend:
        remedy = "set it to false, or run with --set spec.suspend=false"
        raise JobError("spec.suspend: the job is suspended", field="spec.suspend", value=True, remedy=remedy)


def _begin(job: FineTuningJob, run: RunDirectory) -> None:
    """Keeps the job, for resume. Raises StoreError where the directory holds a run with other mathematics."""
    if run.job.is_file() and spec_digest(read_job(run.job)) != spec_digest(job):
        raise StoreError(
            f"{run.root}: holds a run of a job with other data, model or hyperparameters",
            field="directory",
            value=str(run.root),
            remedy="name another directory; aim-trainer compare says what differs",
        )
    write_whole(run.job, as_yaml(job).encode())


def _rows(job: FineTuningJob, run: RunDirectory) -> Rows:
    """Tokenised once, by this process: workers map it."""
    keep_tokenizer(job, run)
    for left in run.data.glob("*/*.part"):  # by a driver that was killed; we are alone at this run
        shutil.rmtree(left, ignore_errors=True)
    prepared = prepare(job, run.tokenizer, run.data)
    _tell(run, _read(job, prepared))
    return Rows(prepared.train, prepared.validation, prepared.digest)


def _read(job: FineTuningJob, prepared: Prepared) -> Note:
    """What is trained on, and a row of it as the model sees it."""
    told = prepared.statistics
    share = "" if job.spec.template == "classification" else f", {told.trained_share:.1%} of them trained"
    message = f"{told.rows:,} rows to train on, {told.validation_rows:,} held out; {told.tokens:,} tokens{share}"
    tokens = Tokens(prepared.train)
    row = marked(stretches(tokens[0], read_tokenizer(job.spec.base_model)))
    return Note("read", f"{message}\n{row[:_SAMPLE_CHARACTERS].strip()}", {"rows": told.rows, "tokens": told.tokens})


def keep_tokenizer(job: FineTuningJob, run: RunDirectory) -> None:
    """The base model's, where it is not there yet. Raises JobError."""
    if run.tokenizer.is_dir():
        return
    partial = run.tokenizer.with_name("tokenizer.part")  # a killed run leaves no half of one
    shutil.rmtree(partial, ignore_errors=True)
    read_tokenizer(job.spec.base_model).save_pretrained(partial)
    partial.rename(run.tokenizer)


def _judge(job: FineTuningJob, run: RunDirectory, rows: Path | None) -> Judgement:
    """Where the devices are."""
    sink = sinks.beside(run)
    return judge(job, run, rows, runner.device_of(job), sink)


def _tell(run: RunDirectory, note: Note) -> None:
    sinks.beside(run).tell(note)


def _report(run: RunDirectory) -> None:
    try:
        write_report(run)
    except OSError as error:
        raise StoreError(f"{run.report}: {error.strerror}", field="report", remedy="free space, then resume") from error
