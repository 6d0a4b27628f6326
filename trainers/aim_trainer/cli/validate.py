"""`aim-trainer validate`, beyond the job's own file: every row of its sources."""

from __future__ import annotations

from aim_trainer.data.problems import named
from aim_trainer.data.survey import check
from aim_trainer.evaluate.regressions import read_regressions
from aim_trainer.job.job import FineTuningJob
from aim_trainer.publish.beforehand import check_places


def sources(job: FineTuningJob) -> list[str]:
    """A line for each source and for the regression prompts. Raises DataError with all rows that cannot be trained on,
    or lines that are no prompt; StoreError.
    """
    lines = []
    for seen in check(job.spec):
        ignored = f"; not read: {named(sorted(seen.ignored))}" if seen.ignored else ""
        lines.append(f"{seen.uri}: {seen.rows:,} rows, {seen.format}{ignored}")
    if prompts := job.spec.validation.regression_prompts:
        lines.append(f"{prompts}: {len(read_regressions(prompts)):,} regression prompts")
    return lines


def places(job: FineTuningJob) -> list[str]:
    """A line for each place that the job writes to. Raises StoreError where it could not now; JobError."""
    return [f"{place}: can be written to" for place in check_places(job)]
