"""What one process of a run does, alone or among others. It knows nothing of who started it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from aim_trainer.checkpoints.checkpoint import Identity
from aim_trainer.checkpoints.store import open_store
from aim_trainer.data.batches import Batches
from aim_trainer.data.tokens import Tokens
from aim_trainer.errors import StoreError
from aim_trainer.job.digest import spec_digest
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.steps import batches as arithmetic
from aim_trainer.metrics import sinks
from aim_trainer.metrics.records import Sink
from aim_trainer.recipe import batch_size
from aim_trainer.recipe.model import load, save
from aim_trainer.recipe.train import Outcome, train
from aim_trainer.recipe.workers import Workers
from aim_trainer.run_directory import RunDirectory


@dataclass(frozen=True, slots=True)
class Rows:
    """What is trained and measured on: directories of `data/tokens`, and the digest of what is in them."""

    train: Path
    validation: Path | None
    digest: str


def work(
    job: FineTuningJob,
    run: RunDirectory,
    rows: Rows,
    workers: Workers,
    stop: Callable[[], bool],
    sink: Sink | None = None,
) -> Outcome:
    """Trains from the newest valid checkpoint to the end, or until `stop`; at the end the weights are in `run.result`.

    sink: told, and closed, in place of the run's own. Raises TrainerError.
    """
    torch.set_num_threads(job.spec.resources.cpu)  # a second thread on a busy core makes a step thirty times longer
    tokens, validation = _tokens(rows.train), _tokens(rows.validation) if rows.validation else None
    loaded = load(job, workers.device)
    micro_batch = batch_size.find(job, loaded, workers, tokens, run.batch_size)
    batches = dealt(job, tokens, micro_batch, workers, loaded.tokenizer.pad_token_id)
    checkpoints = job.spec.checkpoints
    identity = Identity(job.metadata.name, spec_digest(job), rows.digest)
    store = open_store(checkpoints.uri or str(run.checkpoints), identity, checkpoints)
    sink = sink or sinks.of(job, run, workers.rank)
    try:
        outcome = train(job, loaded, batches, validation, workers, store, sink, stop)
    finally:
        sink.close()
    if not outcome.stopped:
        save(loaded, run.result, workers)
    return outcome


def dealt(
    job: FineTuningJob, tokens: Tokens, micro_batch: int = 1, workers: Workers | None = None, pad_id: int = 0
) -> Batches:
    """The job's rows as steps. micro_batch: what was found where batchSize is auto. Raises JobError."""
    workers = workers or Workers()
    counted = arithmetic(job, len(tokens), micro_batch)
    return Batches(
        tokens,
        seed=job.spec.hyperparameters.seed,
        global_batch=counted.global_batch,
        micro_batch=counted.micro_batch,
        max_seq_length=job.spec.hyperparameters.max_seq_length,
        packing=job.spec.dataset.packing,
        world_size=workers.world_size,
        rank=workers.rank,
        pad_id=pad_id,
    )


def _tokens(directory: Path) -> Tokens:
    if not (directory / "about.json").is_file():
        raise StoreError(
            f"{directory}: the tokenised rows are not there for this worker",
            field=str(directory),
            remedy="put the run's directory on a volume that all workers mount at the same path",
        )
    return Tokens(directory)
