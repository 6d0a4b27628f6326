"""What a search found: a table as CSV and JSON, a plot, and the best job, ready to be run."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.override import with_parameters
from aim_trainer.job.read import as_yaml
from aim_trainer.metrics.json_lines import read_records
from aim_trainer.metrics.records import Evaluation
from aim_trainer.run_directory import RunDirectory

from .asked import search_of

End = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Trial:
    """name: its directory below trials/; value: the objective as last measured, None: never; why: of one that failed,
    or was stopped, in a line. step: the last that was measured; gpu_hours: spent by then.
    """

    name: str
    values: Mapping[str, int | float | str | bool]
    end: End
    value: float | None
    step: int
    gpu_hours: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """trials: best first, then those without a value. best: None where none came to its end."""

    trials: tuple[Trial, ...]
    best: Trial | None

    @property
    def gpu_hours(self) -> float:
        return sum(trial.gpu_hours for trial in self.trials)


def found_of(job: FineTuningJob, trials: list[Trial]) -> Found:
    """Only a trial that came to its end is a best one: what a stopped one would have come to nobody knows."""
    sign = 1 if search_of(job).objective.direction == "minimize" else -1

    def rank(trial: Trial) -> tuple[bool, float, str]:
        known = trial.value is not None and math.isfinite(trial.value)
        return not known, sign * (trial.value or 0.0) if known else 0.0, trial.name

    ordered = tuple(sorted(trials, key=rank))
    ended = (trial for trial in ordered if trial.end == "finished" and trial.value is not None)
    return Found(ordered, next((trial for trial in ended if math.isfinite(trial.value or 0.0)), None))


def write_results(job: FineTuningJob, root: Path, found: Found) -> None:
    """results.json, results.csv, search.svg and best.yaml in `root`."""
    objective = search_of(job).objective
    told = {"objective": objective.model_dump(by_alias=True), "gpuHours": found.gpu_hours}
    best = found.best.name if found.best else None
    told |= {"best": best, "trials": [asdict(trial) for trial in found.trials]}
    (root / "results.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    _write_table(job, root / "results.csv", found)
    if found.best is not None:
        made = with_parameters(job, found.best.values)
        text = (
            f"# The best of {len(found.trials)} trials: {objective.metric} {found.best.value!r} ({found.best.name}).\n"
        )
        (root / "best.yaml").write_text(text + as_yaml(made), encoding="utf-8")
    _draw(job, root, found)


def _write_table(job: FineTuningJob, file: Path, found: Found) -> None:
    names = [parameter.name for parameter in search_of(job).parameters]
    with file.open("w", encoding="utf-8", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(("trial", "end", search_of(job).objective.metric, "step", "gpu_hours", *names, "why"))
        for trial in found.trials:
            values: list[Any] = [trial.values.get(name, "") for name in names]
            value = "" if trial.value is None else trial.value
            table.writerow((trial.name, trial.end, value, trial.step, f"{trial.gpu_hours:.6f}", *values, trial.why))


def _draw(job: FineTuningJob, root: Path, found: Found) -> None:
    """Each trial's objective over its steps, the best one on top."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    metric = search_of(job).objective.metric
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for trial in reversed(found.trials):
        steps, values = _curve(RunDirectory(root / "trials" / trial.name), metric)
        is_best = found.best is not None and trial.name == found.best.name
        style = {"color": "#c1121f", "linewidth": 2.2} if is_best else {"color": "#8d99ae", "linewidth": 1.1}
        label = ", ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in trial.values.items())
        axes.plot(steps, values, marker="o", markersize=3, label=f"{trial.name}: {label} ({trial.end})", **style)
    axes.set(xlabel="step", ylabel=metric, title=f"{job.metadata.name}: {len(found.trials)} trials")
    axes.grid(alpha=0.3)
    if len(found.trials) <= 12:
        axes.legend(fontsize=7)
    figure.savefig(root / "search.svg", metadata={"Date": None})
    pyplot.close(figure)


def _curve(run: RunDirectory, metric: str) -> tuple[list[int], list[float]]:
    told = [each.record for each in read_records(run.metrics) if isinstance(each.record, Evaluation)]
    points = [(record.step, record.metrics[metric]) for record in told if metric in record.metrics]
    return [step for step, _ in points], [value for _, value in points]


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
