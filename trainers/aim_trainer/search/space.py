"""The job's parameters as Ray Tune samples them: whole numbers where the field is one."""

from __future__ import annotations

from typing import Any

from ray import tune

from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.judged import Parameter
from aim_trainer.job.override import problem_with

from .asked import search_of


def space(job: FineTuningJob) -> dict[str, Any]:
    """Name → Tune's domain. That every end of it may stand in the job was checked when the job was read."""
    return {parameter.name: _domain(job, parameter) for parameter in search_of(job).parameters}


def _domain(job: FineTuningJob, parameter: Parameter) -> Any:
    asked = parameter.search_space
    if asked.categorical is not None:
        return tune.choice(list(asked.categorical))
    span = asked.uniform or asked.log_uniform
    assert span is not None
    if _is_whole(job, parameter.name, span.min, span.max):
        low, high = int(span.min), int(span.max)
        return tune.randint(low, high + 1) if asked.uniform else tune.lograndint(low, high + 1)
    return tune.uniform(span.min, span.max) if asked.uniform else tune.loguniform(span.min, span.max)


def _is_whole(job: FineTuningJob, name: str, low: float, high: float) -> bool:
    """Whether the field takes no value between two whole numbers."""
    between = low + (high - low) / 3
    if between == int(between):
        between = low + (high - low) * 0.3
    return problem_with(job.spec, name, between) is not None
