"""What a job asks to be searched."""

from __future__ import annotations

from aim_trainer.errors import JobError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.judged import Search


def search_of(job: FineTuningJob) -> Search:
    """What the job asks to be searched. Raises JobError: nothing."""
    if job.spec.search is None:
        raise JobError(
            "spec.search: the job has none",
            field="spec.search",
            remedy="name parameters, as in parameters: [{name: hyperparameters.learningRate, "
            "searchSpace: {logUniform: {min: 1.0e-5, max: 1.0e-3}}}]",
        )
    return job.spec.search
