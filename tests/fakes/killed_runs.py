"""Training runs in processes of their own, to be killed at any moment, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import as_yaml
from aim_trainer.metrics.json_lines import read_records
from aim_trainer.metrics.records import Note, Step
from aim_trainer.run_directory import RunDirectory
from aim_trainer.worker import Rows
from forked import forked, together


@dataclass
class Run:
    """A job in its directory. ray: under Ray; else several workers are processes that speak gloo."""

    job: FineTuningJob
    rows: Path
    root: Path
    ray: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.root)

    @contextlib.contextmanager
    def begun(self) -> Iterator[BaseProcess]:
        """A process that trains, to the end if nobody kills it."""
        process = forked(_train, self)
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()

    def to_the_end(self) -> dict[int, tuple[str, str]]:
        """Trains, or goes on; `losses` then."""
        workers = 1 if self.ray else self.job.spec.distributed.workers
        if workers == 1:
            with self.begun() as process:
                process.join()
                assert process.exitcode == 0
            return self.losses()
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as meeting:
            assert together(_work, [(self, rank, workers, f"file://{meeting}/here") for rank in range(workers)])
        return self.losses()

    def paused(self, process: BaseProcess, patience_s: float) -> int:
        """The step at whose end SIGTERM leaves it, before its last: that one is saved."""
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        process.join(patience_s)
        assert process.exitcode == 143
        step = max(self.losses())
        assert self.job.spec.hyperparameters.max_steps is not None
        assert step < self.job.spec.hyperparameters.max_steps
        assert self.committed()[-1] == step
        return step

    def losses(self) -> dict[int, tuple[str, str]]:
        """Step → (loss, gradient norm), to the last bit."""
        steps = [told.record for told in read_records(self.directory.metrics) if isinstance(told.record, Step)]
        assert len({step.step for step in steps}) == len(steps)
        return {step.step: (step.loss.hex(), step.grad_norm.hex()) for step in steps}

    def resumed_from(self) -> list[int]:
        """The steps of checkpoints that were gone on from, in their order."""
        notes = [told.record for told in read_records(self.directory.metrics) if isinstance(told.record, Note)]
        return [int(str(note.fields["step"])) for note in notes if note.kind == "resumed"]

    def committed(self) -> list[int]:
        """Steps of checkpoints that are whole."""
        return sorted(int(file.parent.name[5:]) for file in self.directory.checkpoints.glob("*/step-*/COMMIT.json"))


def _train(run: Run) -> None:
    os.environ.update(run.environment)
    from aim_trainer import runner
    from aim_trainer.stopping import stopping

    run.root.mkdir(parents=True, exist_ok=True)
    with stopping(run.directory.stop):
        outcome = runner.train(run.job, run.directory, Rows(run.rows, None, "digest"), ray=run.ray)
    os._exit(128 + signal.SIGTERM if outcome.stopped else 0)


def _work(run: Run, rank: int, workers: int, meeting: str) -> None:
    import torch.distributed as dist

    from aim_trainer.recipe.workers import Workers
    from aim_trainer.worker import work

    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    place = Workers(rank, workers, rank)
    assert not work(run.job, run.directory, Rows(run.rows, None, "digest"), place, lambda: False).stopped
    os._exit(0)


def search_that_dies(job: FineTuningJob, root: Path, environment: Mapping[str, str], at: int) -> int | None:
    """A search in a process that kills itself once its `at`-th trial is chosen and Tune has written that down. Its
    exit code.
    """
    process = forked(_search, job, root, environment, at)
    process.start()
    process.join()
    return process.exitcode


def _search(job: FineTuningJob, root: Path, environment: Mapping[str, str], at: int) -> None:
    os.environ.update(environment)
    from ray.tune.execution.tune_controller import TuneController

    from aim_trainer.search.search import search

    write_down = TuneController.checkpoint

    def dies(self: Any, *given: Any, **named: Any) -> None:
        if len(self.get_trials()) < at:
            write_down(self, *given, **named)
            return
        write_down(self, force=True, wait=True)
        os.kill(os.getpid(), signal.SIGKILL)

    TuneController.checkpoint = dies
    search(job, RunDirectory(root))


class Struck(NamedTuple):
    """A process sends itself these signals, one at each change it makes to a name with `at` in it."""

    at: str
    signals: tuple[signal.Signals, ...]


def driven(
    job: FineTuningJob,
    root: Path,
    die_at: int | Struck | None = None,
    verb: Literal["run", "publish", "evaluate"] = "run",
) -> int | None:
    """`aim-trainer run`, data to publication, or another verb of that run, in a process that kills itself at the
    `die_at`-th change it makes to names below `root`: a file that is opened to be written, a name that is made, changed
    or removed. Its exit code; what it says is in `said`.
    """
    process = forked(_drive, job, root, die_at, verb)
    process.start()
    process.join()
    return process.exitcode


def said(root: Path) -> str:
    """By the last of `driven`."""
    return root.with_suffix(".said").read_text()


def changes(root: Path) -> int:
    """How many `driven` made to its end."""
    return int(root.with_suffix(".changes").read_text())


def _drive(job: FineTuningJob, root: Path, die_at: int | Struck | None, verb: str) -> None:
    made = 0
    signals = list(die_at.signals) if isinstance(die_at, Struck) else []

    def heard(event: str, given: tuple[Any, ...]) -> None:
        nonlocal made
        if (event in _NAMES_CHANGE or (event == "open" and _writes(*given))) and _below(root, given[:2]):
            made += 1
            if made == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if signals and isinstance(die_at, Struck) and die_at.at in f"{given[0]} {given[1]}":
                os.kill(os.getpid(), signals.pop(0))

    sys.addaudithook(heard)
    from aim_trainer.cli.app import app

    root.with_suffix(".yaml").write_text(as_yaml(job))
    with root.with_suffix(".said").open("w") as sys.stderr:
        try:
            app([verb, *_given(verb, root)])
        finally:
            root.with_suffix(".changes").write_text(str(made))


def _given(verb: str, root: Path) -> list[str]:
    job = str(root.with_suffix(".yaml"))
    if verb == "run":
        return [job, "--directory", str(root), "--no-ray"]
    return [str(root)] if verb == "publish" else [job, str(root)]


_NAMES_CHANGE = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def _writes(_path: object, mode: str | None, flags: int) -> bool:
    return bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))


def _below(root: Path, names: tuple[object, ...]) -> bool:
    return any(str(name).startswith(f"{root}/") for name in names)


def wait_until(condition: Callable[[], object], process: BaseProcess, patience_s: float = 400) -> None:
    """Looks a hundred times a second. Fails where the process ends, or patience does."""
    until = time.monotonic() + patience_s
    while not condition():
        assert process.is_alive(), f"ended with {process.exitcode}"
        assert time.monotonic() < until, "it does not come to that"
        time.sleep(0.01)
