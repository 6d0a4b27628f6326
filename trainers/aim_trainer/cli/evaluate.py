"""`aim-trainer evaluate`: base and tuned model of a run side by side, once more."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

from aim_profile.cli.output import Output, Table, show
from aim_trainer.data.tokens import Tokens, newest
from aim_trainer.errors import StoreError
from aim_trainer.evaluate.gates import require
from aim_trainer.evaluate.judge import Judgement, judge
from aim_trainer.job.job import FineTuningJob
from aim_trainer.metrics import sinks
from aim_trainer.report.judged import comparison
from aim_trainer.report.judged import gates as gates_in_words
from aim_trainer.report.write import write_report
from aim_trainer.run_directory import RunDirectory
from aim_trainer.runner import device_of
from aim_trainer.stopping import alone


def evaluate(job: FineTuningJob, directory: Path, output: Output) -> None:
    """Judges the run's result, writes its evaluation.json and its page anew and prints both models' measures.

    Raises GateError (after all is written), ResourceError, StoreError, DataError, JobError.
    """
    run = RunDirectory(directory)
    if not directory.is_dir():
        raise StoreError(f"{directory}: no run is there", field="run", remedy="name the directory of a run")
    device = device_of(job)
    sink = sinks.beside(run)
    with alone(run), closing(sink):
        judgement = judge(job, run, _held_out(run), device, sink)
        write_report(run)
    show(output, dataclasses.asdict(judgement), *_tables(judgement))
    require(judgement.gates)


def _tables(judgement: Judgement) -> list[Table]:
    said = dataclasses.asdict(judgement)
    rows = [(row["name"], row["base"], row["tuned"], row["change"], row["of"]) for row in comparison(said)]
    columns = ("measure", "base", "tuned", "change", "of")
    tables = [Table(columns, rows, right=columns[1:])]
    if judgement.gates:
        gates = [(gate["name"], gate["bound"], gate["value"], gate["said"]) for gate in gates_in_words(said)]
        tables.append(Table(("gate", "bound", "measured", ""), gates, right=("measured",)))
    return tables


def _held_out(run: RunDirectory) -> Path | None:
    """The held-out rows as the run tokenised them last."""
    rows = newest(run.data / "validation")
    return rows if rows is not None and len(Tokens(rows)) else None
