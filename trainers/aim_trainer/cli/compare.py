"""`aim-trainer compare`: runs side by side, by what they were told and what they came to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aim_profile.cli.output import Output, Table, show
from aim_trainer.job.fields import without_signature
from aim_trainer.job.job import FineTuningJob
from aim_trainer.metrics.words import seconds_in_words
from aim_trainer.report.read import Curves, Left

from .status import left_by, state

#: Parts of a job that say nothing of what was learned.
_UNTOLD = frozenset({"output", "checkpoints", "resources", "search", "suspend", "backoffLimit"})


def compare(directories: Sequence[Path], output: Output) -> None:
    """A column for each run. Raises StoreError for one that is none."""
    runs = [left_by(directory) for directory in directories]
    names = _names(directories)
    asked = _differences([run.job for run in runs])
    came_to = [{"state": state(run.curves), **_measures(run), **_effort(run.curves)} for run in runs]
    measures = dict.fromkeys(name for found in came_to for name in found)
    data = [
        {"run": str(directory), "job": {name: values[at] for name, values in asked.items()}} | found
        for at, (directory, found) in enumerate(zip(directories, came_to, strict=True))
    ]
    show(
        output,
        data,
        Table(("set", *names), [(name, *(_text(name, value) for value in values)) for name, values in asked.items()]),
        Table(
            ("came to", *names),
            [(name, *(_text(name, found.get(name)) for found in came_to)) for name in measures],
            right=names,
        ),
    )


def _names(directories: Sequence[Path]) -> list[str]:
    """The last part of each, with as much before it as tells them apart; whole paths where they end alike."""
    short = [directory.resolve().name for directory in directories]
    return short if len(set(short)) == len(short) else [str(directory) for directory in directories]


def _differences(jobs: Sequence[FineTuningJob | None]) -> dict[str, list[Any]]:
    """Fields of the jobs (from spec on) with a value in each, where they are not all the same."""
    flat = [_flat(job.spec.model_dump(mode="json", by_alias=True)) if job else {} for job in jobs]
    names = dict.fromkeys(name for each in flat for name in each if name.partition(".")[0] not in _UNTOLD)
    found = {name: [each.get(name) for each in flat] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _flat(raw: dict[str, Any], before: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in raw.items():
        made |= _flat(value, f"{before}{key}.") if isinstance(value, dict) and value else {f"{before}{key}": value}
    return made


def _measures(run: Left) -> dict[str, float]:
    """Of the tuned model: as it was judged, else as it was measured last while training."""
    judged = run.evaluation.get("tuned")
    last = next(reversed(run.curves.evaluations.values()), {})
    found = {**last, **(judged if isinstance(judged, dict) else {})}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _effort(curves: Curves) -> dict[str, float]:
    if curves.last is None:
        return {}
    return {
        "train_loss": curves.last.loss,
        "steps": curves.last.step,
        "tokens": curves.tokens,
        "seconds": curves.seconds,
        "tokens_per_second": curves.tokens / curves.seconds if curves.seconds else 0.0,
    }


def _text(name: str, value: Any) -> str:
    if name == "seconds" and isinstance(value, float):
        return seconds_in_words(value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "no number"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if value is None:
        return ""
    return without_signature(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
