"""The loop: one optimizer step after another, the same alone and on many workers.

The loss of a step is the sum over the trained tokens of the global batch, divided by their number. So it does not
depend on how the rows were split into micro-batches and over workers, nor on padding and packing.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor

from aim_trainer.checkpoints.checkpoint import CheckpointStore
from aim_trainer.data.batches import Batch, Batches
from aim_trainer.data.tokens import Tokens
from aim_trainer.errors import ResourceError, TrainerError
from aim_trainer.job.hyperparameters import Hyperparameters
from aim_trainer.job.job import FineTuningJob
from aim_trainer.metrics.records import Evaluation, Note, Record, Sink, Step

from . import rng
from .evaluation import held_out
from .loss import summed_loss
from .model import Loaded
from .optimizer import learning_rate, make_optimizer
from .sharding import place
from .state import load_state, save_state
from .weights import trained_weights
from .workers import Workers


@dataclass(frozen=True, slots=True)
class Outcome:
    """step: the last that was taken. stopped: before its end, as was asked. metrics: the last that were measured."""

    step: int
    stopped: bool
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    job: FineTuningJob,
    loaded: Loaded,
    batches: Batches,
    validation: Tokens | None,
    workers: Workers,
    store: CheckpointStore,
    sink: Sink,
    stop: Callable[[], bool],
) -> Outcome:
    """Trains from the newest valid checkpoint to the last step, or until any worker's `stop` says so: then that step is
    ended and saved.

    Raises TrainerError for a loss or gradient that is no number (nothing of that step is kept), ResourceError where
    memory is short, StoreError for checkpoints that cannot be written.
    """
    run = _Run(job, loaded, batches, validation, workers, store, sink)
    step, stopping = 0, False
    try:
        step = run.begin()
        while step < run.steps and not stopping:
            stopping = run.take(step, stop)
            step += 1
            run.evaluate(step, ends=stopping or step == run.steps)
            run.save(step, ends=stopping or step == run.steps)
    except torch.OutOfMemoryError as problem:
        raise ResourceError(
            f"step {step + 1}: {workers.device} is out of memory; checkpoints before it are whole",
            field="spec.hyperparameters.batchSize",
            value=job.spec.hyperparameters.batch_size,
            remedy="lower batchSize (globalBatchSize keeps the mathematics) or maxSeqLength, or set batchSize: auto",
        ) from problem
    return Outcome(step, step < run.steps, run.metrics)


class _Run:
    """What the steps share."""

    def __init__(
        self,
        job: FineTuningJob,
        loaded: Loaded,
        batches: Batches,
        validation: Tokens | None,
        workers: Workers,
        store: CheckpointStore,
        sink: Sink,
    ) -> None:
        self.job, self.hyperparameters = job, job.spec.hyperparameters
        self.loaded, self.batches, self.validation = loaded, batches, validation
        self.workers, self.store, self.sink = workers, store, sink
        self.steps = total_steps(self.hyperparameters, batches.steps_per_epoch)
        self.placed = place(job, loaded, workers)
        self.optimizer = make_optimizer(trained_weights(loaded.model), self.hyperparameters)
        self.metrics: dict[str, float] = {}
        self._micro_batch = len(batches.of(0)[0].input_ids)
        self._measured_at = -1
        self._seconds: deque[float] = deque(maxlen=50)

    def begin(self) -> int:
        """The step to take first. Of a run that begins, the base model is measured."""
        self.loaded.model.train()
        rng.seed(self.hyperparameters.seed, self.workers.rank)
        found = None
        if self.job.spec.checkpoints.resume == "auto":
            found = load_state(self.store, self.workers, self.loaded.model, self.optimizer)
        if found is None:
            self._measure(0)
            return 0
        self.metrics = dict(found.metrics)
        self._tell(Note("resumed", f"resumed from step {found.step}", {"step": found.step, "uri": found.uri}))
        return found.step

    def take(self, step: int, stop: Callable[[], bool]) -> bool:
        """One optimizer step; True: some worker was asked to stop."""
        started = time.perf_counter()
        rate = learning_rate(self.job, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        trained = self.batches.trained_tokens(step)
        summed, tokens = self._gradients(self.batches.of(step), trained)
        norm = clip(trained_weights(self.loaded.model).values(), self.hyperparameters.max_grad_norm)
        total, computed, stopping = self.workers.sums(summed, tokens, stop())
        loss = total / max(trained, 1)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._no_number(step + 1, loss, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self._seconds.append(seconds)
        self._tell(
            Step(
                step=step + 1,
                steps=self.steps,
                epoch=self.batches.epoch(step + 1),
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                tokens=int(computed),
                trained_tokens=trained,
                seconds=seconds,
                eta_s=sum(self._seconds) / len(self._seconds) * (self.steps - step - 1),
                gpu_memory_bytes=_gpu_memory_bytes(self.loaded.device),
            )
        )
        return stopping > 0

    def evaluate(self, step: int, *, ends: bool) -> None:
        """Every so many steps, at the end, and before a checkpoint that may be the best."""
        best = self.job.spec.checkpoints.keep_best is not None and self._saves_at(step, ends=ends)
        if ends or best or step % self._every(self.job.spec.validation.every_steps) == 0:
            self._measure(step)

    def save(self, step: int, *, ends: bool) -> None:
        """A checkpoint, where one is due."""
        if self._saves_at(step, ends=ends):
            metrics = self.metrics if self._measured_at == step else {}
            saved = save_state(self.store, self.workers, self.loaded.model, self.optimizer, step, metrics)
            if saved is not None:
                self._tell(saved)

    def _gradients(self, micro_batches: list[Batch], trained: int) -> tuple[float, int]:
        """Of the mean over the global batch. Returns this worker's summed loss, and the tokens it computed."""
        summed, tokens = torch.zeros((), device=self.loaded.device), 0
        last = len(micro_batches) - 1
        # Gradients are meant over the workers: what is summed is given as many times.
        share = self.workers.world_size / max(trained, 1)
        for number, batch in enumerate(micro_batches):
            with self.placed.accumulating() if number < last else nullcontext():
                loss, _ = summed_loss(self.placed.forward, self.loaded, batch)
                (loss * share).backward()
            summed += loss.detach()
            tokens += batch.input_ids.size if batch.attention_mask is None else int(batch.attention_mask.sum())
        return float(summed), tokens

    def _measure(self, step: int) -> None:
        if self.validation is None or len(self.validation) == 0 or self._measured_at == step:
            return
        self.metrics = held_out(self.loaded, self.validation, self._micro_batch, self.workers)
        self._measured_at = step
        self._tell(Evaluation(step, self.metrics))

    def _saves_at(self, step: int, *, ends: bool) -> bool:
        return ends or step % self._every(self.job.spec.checkpoints.every_steps) == 0

    def _every(self, steps: int | None) -> int:
        """None: once an epoch."""
        return steps or self.batches.steps_per_epoch

    def _tell(self, record: Record) -> None:
        if self.workers.first:
            self.sink.tell(record)

    def _no_number(self, step: int, loss: float, norm: float) -> TrainerError:
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        return TrainerError(
            f"step {step}: {what}; nothing of this step was kept, checkpoints before it are whole",
            field="spec.hyperparameters.learningRate",
            value=self.hyperparameters.learning_rate,
            remedy="lower learningRate, lengthen warmup, or set precision: fp32",
        )


def total_steps(hyperparameters: Hyperparameters, steps_per_epoch: int) -> int:
    """maxSteps, or as many as the epochs take, a begun step whole."""
    return hyperparameters.max_steps or max(1, math.ceil(hyperparameters.epochs * steps_per_epoch))


def clip(weights: Iterable[torch.Tensor], most: float) -> float:
    """Scales gradients down to a norm of `most` over all weights and workers; returns what it was."""
    norm = torch.nn.utils.clip_grad_norm_(list(weights), most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _gpu_memory_bytes(device: str) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None
