"""Processes that are forked from one that has imported torch and the trainer once: each costs a second, not ten."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

_processes = multiprocessing.get_context("forkserver")
# One for the session, whoever asks first: what it has imported cannot be added to later.
_processes.set_forkserver_preload(["aim_trainer.run", "tiny_runs"])


def forked(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process, not yet started, that calls it; the function is one that can be imported."""
    process: BaseProcess = _processes.Process(target=function, args=arguments)
    return process


def together(function: Callable[..., None], each: Sequence[tuple[Any, ...]], patience_s: float = 300) -> bool:
    """Whether a process for each of the arguments came to its end; those that did not are killed."""
    processes = [forked(function, *arguments) for arguments in each]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(patience_s)
        return all(process.exitcode == 0 for process in processes)
    finally:
        for process in processes:
            process.kill()
