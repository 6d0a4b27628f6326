"""The sinks of a process of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from aim_trainer.job.job import FineTuningJob
from aim_trainer.run_directory import RunDirectory

from .all_sinks import AllSinks
from .json_lines import JsonLines
from .kubeflow import URL as kubeflow_url
from .kubeflow import Kubeflow
from .progress import Progress
from .published import URL as published_url
from .published import Published
from .records import Sink
from .terminal import terminal

_LOG = logging.getLogger(__name__)
#: The port of `/metrics`; no port, no server. A variable, for it is the machine's business and not the job's: Ray
#: hands it on to its workers.
METRICS_PORT = "AIM_TRAINER_METRICS_PORT"


def of(job: FineTuningJob, run: RunDirectory, rank: int) -> Sink:
    """All of them for rank 0, none for the others. One that cannot be opened is named in the log and left out."""
    if rank != 0:
        return AllSinks([])
    makers: list[tuple[str, Callable[[], Sink | None]]] = [
        ("a file of metrics", lambda: JsonLines(run.metrics)),
        ("a file of progress", lambda: Progress(run.progress)),
        ("TensorBoard's files", lambda: _tensor_board(run)),
        ("Prometheus", lambda: _prometheus(job)),
        ("Kubeflow's status", _kubeflow),
        ("the terminal", terminal),
    ]
    return AllSinks(sink for name, make in makers if (sink := _opened(name, make)) is not None)


def beside(run: RunDirectory) -> Sink:
    """Those of whoever begins, judges and ends a run, before and after its workers: notes are all they tell."""
    told = [kept(run), terminal()]
    published = _opened("what is published", lambda: Published(os.environ) if os.environ.get(published_url) else None)
    return AllSinks([*told, *([published] if published else [])])


def kept(run: RunDirectory) -> Sink:
    """The files alone: for what the process says by itself."""
    return AllSinks([JsonLines(run.metrics), Progress(run.progress)])


def _opened(name: str, make: Callable[[], Sink | None]) -> Sink | None:
    try:
        return make()
    except (OSError, ValueError) as problem:
        _LOG.warning("%s cannot be written, and training goes on without: %s", name, problem)
        return None


def _tensor_board(run: RunDirectory) -> Sink:
    from .tensor_board import TensorBoard

    return TensorBoard(run.tensorboard)


def _kubeflow() -> Sink | None:
    return Kubeflow(os.environ) if os.environ.get(kubeflow_url) else None


def _prometheus(job: FineTuningJob) -> Sink | None:
    port = os.environ.get(METRICS_PORT)
    if not port:
        return None
    if not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"{METRICS_PORT}: a port, 0 to 65535 (got {port!r})")
    from .prometheus import Prometheus

    spec = job.spec
    about = {"name": job.metadata.name, "method": spec.method, "base_model": spec.base_model.model_id}
    return Prometheus(int(port), about)
