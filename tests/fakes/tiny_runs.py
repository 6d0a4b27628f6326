"""Short training runs of tiny models: jobs, rows, a store in memory's stead, and a sink that remembers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aim_trainer.checkpoints.checkpoint import Checkpoint
from aim_trainer.data.tokens import Row, Tokens, write_tokens
from aim_trainer.errors import StoreError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.metrics.records import Evaluation, Record, Saved, Step
from aim_trainer.recipe.model import Loaded, load
from aim_trainer.recipe.train import Outcome, train
from aim_trainer.recipe.workers import Workers
from aim_trainer.worker import dealt
from tiny_models import conversations, tokenizer


def tiny_job(model: Path | str, method: str = "lora", **changed: Any) -> FineTuningJob:
    """changed: hyperparameters in camelCase; `quantization`, `strategy`, `workers`, `everySteps`, `packing`,
    `template`, `labels` go where they belong.
    """
    spec: dict[str, Any] = {
        "baseModel": {"modelId": str(model)},
        "method": method,
        "dataset": {"source": "rows.jsonl"},
        "distributed": {},
        "checkpoints": {},
    }
    places = {
        "quantization": spec,
        "template": spec,
        "packing": spec["dataset"],
        "labels": spec["dataset"],
        "strategy": spec["distributed"],
        "workers": spec["distributed"],
        "everySteps": spec["checkpoints"],
        "resume": spec["checkpoints"],
        "keepBest": spec["checkpoints"],
    }
    hyperparameters = {"learningRate": 5e-3, "batchSize": 4, "maxSeqLength": 128, "gradientCheckpointing": False}
    for key, value in changed.items():
        places.get(key, hyperparameters)[key] = value
    return FineTuningJob.model_validate(
        {
            "apiVersion": "aim.amd.com/v1alpha1",
            "kind": "FineTuningJob",
            "metadata": {"name": "tiny"},
            "spec": spec | {"hyperparameters": hyperparameters},
        }
    )


def chat_tokens(directory: Path, count: int, seed: int = 0) -> Tokens:
    """Conversations as rows; what the assistant says is trained."""
    write_tokens(directory, _chat_rows(count, seed), {})
    return Tokens(directory)


def _chat_rows(count: int, seed: int) -> list[Row]:
    reader = tokenizer()
    rows = []
    for turns in conversations(count, seed):
        read = reader.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        rows.append(Row(np.asarray(read["input_ids"], np.int32), np.asarray(read["assistant_masks"], np.uint8)))
    return rows


def class_tokens(directory: Path, count: int, seed: int = 0) -> Tokens:
    """Rows of two classes, told apart by one word: 1 where it asks how many, else 0."""
    reader, rows = tokenizer(), []
    for number, turns in enumerate(conversations(count, seed)):
        text = turns[0]["content"] if number % 2 else turns[1]["content"]
        ids = np.asarray(reader(text)["input_ids"], np.int32)
        rows.append(Row(ids, np.zeros(len(ids), np.uint8), number % 2))
    write_tokens(directory, rows, {})
    return Tokens(directory)


@dataclass
class Told:
    """A sink that remembers."""

    records: list[Record] = field(default_factory=list)

    def tell(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        """Nothing to close."""

    @property
    def steps(self) -> list[Step]:
        return [record for record in self.records if isinstance(record, Step)]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def evaluations(self) -> list[Evaluation]:
        return [record for record in self.records if isinstance(record, Evaluation)]

    @property
    def saved(self) -> list[Saved]:
        return [record for record in self.records if isinstance(record, Saved)]


@dataclass
class CopiedCheckpoints:
    """A store that keeps every checkpoint, copied beside each other, and verifies nothing. With a file `full` in it,
    it takes none.
    """

    root: Path

    def save(self, step: int, files: Path, world_size: int, metrics: dict[str, float]) -> Checkpoint:
        if (self.root / "full").exists():
            raise StoreError("no space left", field="spec.checkpoints.uri", value=self.root, remedy="make room")
        shutil.copytree(files, self.root / f"{step:06d}-{world_size}")
        return Checkpoint(step, str(self.root / f"{step:06d}-{world_size}"), world_size, metrics)

    def newest_valid(self) -> Checkpoint | None:
        if not (found := sorted(self.root.glob("*-*"))):
            return None
        step, world_size = found[-1].name.split("-")
        return Checkpoint(int(step), str(found[-1]), int(world_size), {})

    def fetch(self, checkpoint: Checkpoint, into: Path) -> Path:
        return Path(checkpoint.uri)

    def prune(self) -> None:
        """Keeps all."""


@dataclass
class Ran:
    """What a run left."""

    outcome: Outcome
    told: Told
    loaded: Loaded


def run_tiny(
    job: FineTuningJob,
    tokens: Tokens,
    store: Path,
    validation: Tokens | None = None,
    workers: Workers | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Ran:
    """Loads and trains, all in this process."""
    workers = workers or Workers()
    loaded, told = load(job, workers.device), Told()
    batches = dealt(job, tokens, workers=workers, pad_id=loaded.tokenizer.pad_token_id)
    store.mkdir(parents=True, exist_ok=True)
    outcome = train(job, loaded, batches, validation, workers, CopiedCheckpoints(store), told, stop)
    return Ran(outcome, told, loaded)
