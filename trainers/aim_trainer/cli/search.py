"""`aim-trainer search`: which values of a job are best."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from aim_profile.cli.output import Facts, Output, Table, show
from aim_trainer.errors import ResourceError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.run_directory import RunDirectory
from aim_trainer.search.asked import search_of
from aim_trainer.search.search import search


def search_job(job: FineTuningJob, directory: Path, output: Output) -> None:
    """Prints the table of trials, best first. Raises TrainerError; ResourceError where no trial came to its end."""
    found = search(job, RunDirectory(directory))
    names = [parameter.name for parameter in search_of(job).parameters]
    metric = search_of(job).objective.metric
    rows = [
        (
            trial.name,
            trial.end,
            _figure(trial.value),
            str(trial.step),
            *(_figure(trial.values.get(name)) for name in names),
        )
        for trial in found.trials
    ]
    best = f"{directory / 'best.yaml'}" if found.best else "none: no trial came to its end"
    data = {"best": asdict(found.best) if found.best else None, "trials": [asdict(trial) for trial in found.trials]}
    table = Table(("trial", "end", metric, "step", *names), rows, right=(metric, "step", *names))
    facts = Facts([("best", best), ("GPU-hours", f"{found.gpu_hours:.4g}"), ("plot", str(directory / "search.svg"))])
    show(output, data, table, facts)
    if found.best is None:
        why = next((trial.why for trial in found.trials if trial.why), "all were stopped")
        raise ResourceError(
            f"no trial came to its end: {why}", field="spec.search", remedy="see the trials' directories for their runs"
        )


def _figure(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
