"""`aim-trainer validate`, beyond the job's own file: every row of its sources."""

from __future__ import annotations

from aim_trainer.data.survey import check
from aim_trainer.job.job import FineTuningJob


def sources(job: FineTuningJob) -> list[str]:
    """A line for each source. Raises DataError with all rows that cannot be trained on; StoreError."""
    lines = []
    for seen in check(job.spec):
        ignored = f"; not read: {', '.join(sorted(seen.ignored))}" if seen.ignored else ""
        lines.append(f"{seen.uri}: {seen.rows:,} rows, {seen.format}{ignored}")
    return lines
