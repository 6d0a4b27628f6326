"""TensorBoard's event files, under the tags that Hugging Face's trainer uses: `train/loss`, `eval/loss`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from .records import Evaluation, Note, Record, Saved, Step

_FLUSH_S = 10


class TensorBoard:
    """One event file a process. The first step makes TensorBoard forget it and later ones of earlier files."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError: the directory cannot be written."""
        self._writer: Any = EventFileWriter(str(directory), flush_secs=_FLUSH_S)
        self._begun = False
        self._closed = False

    def tell(self, record: Record) -> None:
        """Raises OSError: an earlier write failed."""
        match record:
            case Step():
                self._begin(record.step)
                self._add(record.step, _of_step(record))
            case Evaluation():
                self._add(record.step, {_evaluated(name): value for name, value in record.metrics.items()})
            case Saved():
                self._add(record.step, {"checkpoint/bytes": record.bytes, "checkpoint/seconds": record.seconds})
            case Note():
                pass  # it has no number to draw

    def close(self) -> None:
        """Writes what is held back. Raises OSError."""
        if not self._closed:
            self._closed = True
            self._writer.close()

    def _begin(self, step: int) -> None:
        if not self._begun:
            self._begun = True
            self._event(step, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, numbers: dict[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._event(step, summary=Summary(value=values))

    def _event(self, step: int, **content: Any) -> None:
        self._writer.add_event(Event(step=step, wall_time=time.time(), **content))


def _of_step(step: Step) -> dict[str, float]:
    numbers = {
        "train/loss": step.loss,
        "train/learning_rate": step.learning_rate,
        "train/grad_norm": step.grad_norm,
        "train/epoch": step.epoch,
        "train/tokens_per_second": step.tokens_per_second,
    }
    memory = step.gpu_memory_bytes
    return numbers if memory is None else numbers | {"train/gpu_memory_bytes": memory}


def _evaluated(name: str) -> str:
    return "eval/" + name.removeprefix("eval_")
