"""A job's file: what is read, and how a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from aim_trainer.errors import JobError
from aim_trainer.job.read import read_job

JOB = """\
apiVersion: aim.amd.com/v1alpha1
kind: FineTuningJob
metadata: {name: support-bot}
spec:
  baseModel: {modelId: HuggingFaceTB/SmolLM2-135M-Instruct}
  dataset: {source: chats.jsonl}
  hyperparameters:
    learningRate: 0.001
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def test_a_job_is_read_with_its_defaults(tmp_path: Path) -> None:
    job = read_job(written(tmp_path, JOB))
    assert (job.metadata.name, job.spec.method) == ("support-bot", "lora")
    assert (job.spec.hyperparameters.learning_rate, job.spec.hyperparameters.lora_rank) == (0.001, 16)
    assert [source.uri for source in job.spec.dataset.all_sources()] == ["chats.jsonl"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "learningRate",
            "learningRat",
            "job.yaml:8: spec.hyperparameters.learningRat: unknown key; did you mean",
        ),
        ("0.001", "-1", "job.yaml:8: spec.hyperparameters.learningRate: Input should be greater than 0 (got -1)"),
        ("FineTuningJob", "TrainJob", "job.yaml:2: kind: Input should be 'FineTuningJob' (got 'TrainJob')"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, told: str) -> None:
    with pytest.raises(JobError) as refused:
        read_job(written(tmp_path, JOB.replace(old, new)))
    assert told in str(refused.value)
