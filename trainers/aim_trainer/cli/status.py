"""`aim-trainer status`: how far a run is, from what it left in its directory."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import orjson

from aim_profile.cli.output import Facts, Output, Table, show
from aim_trainer.errors import StoreError
from aim_trainer.metrics.words import seconds_in_words
from aim_trainer.report.read import Curves, Left, read_run
from aim_trainer.run_directory import RunDirectory

_MOST_EVALUATIONS = 10


def left_by(directory: Path) -> Left:
    """What a run left. Raises StoreError where there is no run."""
    run = RunDirectory(directory)
    if not directory.is_dir() or not (run.job.is_file() or run.metrics.is_file()):
        raise StoreError(
            f"{directory}: no run is there", field="run", value=str(directory), remedy="name the directory of a run"
        )
    try:
        return read_run(run)
    except OSError as problem:
        raise StoreError(f"{directory}: {problem.strerror}", field="run", value=str(directory)) from problem


def status(directory: Path, output: Output) -> None:
    """For people, or as JSON or YAML with trainerStatus as a controller reads it. Raises StoreError."""
    left = left_by(directory)
    told = trainer_status(RunDirectory(directory).progress)
    data = {
        "run": str(directory),
        "job": left.job.metadata.name if left.job else None,
        "state": state(left.curves),
        "trainerStatus": told,
        "evaluations": [{"step": step} | found for step, found in left.curves.evaluations.items()],
        "checkpoints": left.curves.saved,
        "resumed": left.curves.resumed,
    }
    measured = list(left.curves.evaluations.items())[-_MOST_EVALUATIONS:]
    names = list(dict.fromkeys(name for _, found in measured for name in found))
    rows = [(str(step), *(_number(found.get(name)) for name in names)) for step, found in measured]
    show(output, data, Facts(_facts(data, left.curves)), Table(("step", *names), rows, right=("step", *names)))


def trainer_status(file: Path) -> dict[str, Any]:
    """What progress.json says, empty where there is none or it cannot be read."""
    try:
        found = orjson.loads(file.read_bytes())["trainerStatus"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def state(curves: Curves) -> str:
    """The last thing that was noted; `started` while steps are made and nothing was."""
    return curves.notes[-1][1].kind if curves.notes else "started" if curves.last else "no step yet"


def _facts(data: dict[str, Any], curves: Curves) -> list[tuple[str, str]]:
    last, left = curves.last, data["trainerStatus"].get("estimatedRemainingSeconds")
    facts = [("run", data["run"]), ("job", data["job"] or "unknown"), ("state", data["state"])]
    if last is not None:
        facts += [
            ("step", f"{last.step:,} of {last.steps:,} ({100 * last.step // last.steps} %), epoch {last.epoch:.2f}"),
            ("loss", _number(last.loss)),
            ("learning rate", f"{last.learning_rate:.3g}"),
            ("tokens/s", f"{last.tokens_per_second:,.0f}"),
        ]
    ago = max(0.0, time.time() - curves.last_time)
    return [
        *facts,
        ("left", seconds_in_words(left) if isinstance(left, int | float) and left else ""),
        ("checkpoints", ", ".join(f"{step:,}" for step in curves.saved[-5:])),
        ("resumed from", ", ".join(f"{step:,}" for step in data["resumed"][-5:])),
        ("last told", f"{seconds_in_words(ago)} ago" if curves.first_time is not None else ""),
    ]


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4f}"
