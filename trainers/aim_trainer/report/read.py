"""What a run left behind, read for its page; one pass over its records."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aim_trainer.data.tokens import Tokens, newest
from aim_trainer.errors import JobError
from aim_trainer.installed import versions_of
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import read_job
from aim_trainer.metrics.json_lines import read_records
from aim_trainer.metrics.records import Evaluation, Note, Saved, Step
from aim_trainer.run_directory import RunDirectory

from .series import Series

#: Of a judgement.
_MAPPINGS, _LISTS = ("base", "tuned", "delta", "n", "unmeasured"), ("gates", "samples", "regressions")
_MOST_NOTES, _MOST_SAVED = 200, 10_000
_TOOLS = ("aim-kserve", "torch", "transformers", "peft", "bitsandbytes", "ray", "deepspeed", "tokenizers", "datasets")


@dataclass(slots=True)
class Curves:
    """The numbers of all steps, and what happened between them."""

    loss: Series = field(default_factory=Series)
    learning_rate: Series = field(default_factory=Series)
    grad_norm: Series = field(default_factory=Series)
    tokens_per_second: Series = field(default_factory=Series)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    saved: list[int] = field(default_factory=list)
    notes: list[tuple[float, Note]] = field(default_factory=list)
    last: Step | None = None
    first_time: float | None = None
    last_time: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    gpu_memory_bytes: int | None = None

    def add(self, time: float, record: Step | Evaluation | Saved | Note) -> None:
        self.first_time = time if self.first_time is None else self.first_time
        self.last_time = time
        match record:
            case Step():
                self._step(record)
            case Evaluation():
                self.evaluations[record.step] = record.metrics
            case Saved():
                if len(self.saved) < _MOST_SAVED:
                    self.saved.append(record.step)
            case Note():
                self.notes = [*self.notes[-_MOST_NOTES:], (time, record)]

    def _step(self, step: Step) -> None:
        self.loss.add(step.step, step.loss)
        self.learning_rate.add(step.step, step.learning_rate)
        self.grad_norm.add(step.step, step.grad_norm)
        self.tokens_per_second.add(step.step, step.tokens_per_second)
        self.seconds += step.seconds
        self.tokens += step.tokens
        self.trained_tokens += step.trained_tokens
        if step.gpu_memory_bytes is not None:
            self.gpu_memory_bytes = max(self.gpu_memory_bytes or 0, step.gpu_memory_bytes)
        self.last = step

    @property
    def resumed(self) -> list[int]:
        """The steps that the run was resumed from."""
        found = (note.fields.get("step") for _, note in self.notes if note.kind == "resumed")
        return [step for step in found if isinstance(step, int)]


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokenised rows of one kind. lengths: tokens of each, (rows,), sorted; about: what their writer said of them."""

    digest: str
    lengths: npt.NDArray[np.int64]
    about: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Left:
    """All that a page is made of; what is not there is empty or None."""

    job: FineTuningJob | None
    curves: Curves
    evaluation: dict[str, Any]
    training: Rows | None
    validation: Rows | None
    versions: dict[str, str]
    warnings: list[str]


def read_run(run: RunDirectory) -> Left:
    """Reads what there is. What is there and cannot be read is a warning of the page. Raises OSError."""
    warnings: list[str] = []
    curves = Curves()
    for told in read_records(run.metrics):
        curves.add(told.time, told.record)
    return Left(
        _job(run.job, warnings),
        curves,
        _evaluation(run.evaluation, warnings),
        _rows(run.data / "train", warnings),
        _rows(run.data / "validation", warnings),
        versions_of(_TOOLS),
        warnings,
    )


def _job(file: Path, warnings: list[str]) -> FineTuningJob | None:
    try:
        return read_job(file)
    except (JobError, OSError) as problem:
        warnings.append(f"job.yaml: {problem}")
        return None


def _evaluation(file: Path, warnings: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes(), parse_int=_whole)
        if isinstance(found, dict):
            return _in_shape(found)
        warnings.append("evaluation.json: not the result of an evaluation")
    except FileNotFoundError:
        pass
    except (ValueError, RecursionError) as problem:
        warnings.append(f"evaluation.json: not JSON: {problem}")
    return {}


def _whole(digits: str) -> int | float:
    """More than 64 bits would be too large to draw; infinite at worst, and told as unknown."""
    return int(digits) if len(digits) < len(str(2**63)) else float(digits)


def _in_shape(found: dict[str, Any]) -> dict[str, Any]:
    """Mappings and lists of mappings where a judgement has them; what is none of these there is left out."""
    mappings = {key: value for key in _MAPPINGS if isinstance(value := found.get(key), dict)}
    lists = {key: found[key] for key in _LISTS if isinstance(found.get(key), list)}
    return mappings | {key: [each for each in value if isinstance(each, dict)] for key, value in lists.items()}


def _rows(folder: Path, warnings: list[str]) -> Rows | None:
    """Of the newest whole directory: an earlier one is of a job that was changed."""
    directory = newest(folder)
    if directory is None:
        return None
    try:
        tokens = Tokens(directory)
        about = dict(tokens.about)
    except (OSError, ValueError, TypeError) as problem:
        warnings.append(f"{directory}: damaged, and made anew by the next run: {problem}")
        return None
    return Rows(directory.name, np.sort(tokens.lengths()), about)
