"""Under Ray the losses are those of a plain run, whoever is killed: a worker, the driver, the node's own process.

`SOAK_TRAINER_KILLS=N`: so many, in turn (`make soak`).
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from killed_runs import Run, wait_until
from ray_session import Cluster
from tiny_runs import chat_tokens, tiny_job

pytestmark = pytest.mark.ray
KILLS = int(os.environ.get("SOAK_TRAINER_KILLS", "3"))
STEPS, EVERY = 60, 5
Losses = dict[int, tuple[str, str]]


@pytest.fixture(scope="module")
def run_in(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    rows = tmp_path_factory.mktemp("rows")
    chat_tokens(rows, 40)

    def run(root: Path, workers: int = 1, **given: Any) -> Run:
        job = tiny_job(
            tiny("llama"), maxSteps=STEPS, everySteps=EVERY, loraDropout=0.2, globalBatchSize=8, workers=workers
        )
        return Run(job, rows, root, **given)

    return run


@pytest.fixture(scope="module")
def plain(run_in: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Losses:
    return run_in(tmp_path_factory.mktemp("plain")).to_the_end()


@pytest.fixture(scope="module")
def of_two(run_in: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Of two workers without Ray."""
    return run_in(tmp_path_factory.mktemp("two"), 2).to_the_end()


def address(cluster: Cluster) -> dict[str, str]:
    # A Ray that was started in this process has left its own mode of authentication in the environment.
    return {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}


def of_ray(ancestor: psutil.Process, name: str) -> list[psutil.Process]:
    """Descendants whose title holds the name."""
    found = []
    for process in ancestor.children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def training(run: Run) -> Callable[[], bool]:
    """Whether it is well under way, with a checkpoint to go back to."""
    return lambda: len(run.losses()) > EVERY and bool(run.committed())


def a_worker_is_killed(run_in: Callable[..., Run], cluster: Cluster, root: Path, moment_s: float) -> Losses:
    """Its fellows fail too, and all begin again from the checkpoint, by themselves."""
    run = run_in(root, 2, ray=True, environment=address(cluster))
    with run.begun() as process:
        wait_until(training(run), process)
        time.sleep(moment_s)
        before = run.committed()[-1]
        random.choice(of_ray(cluster.process, "RayTrainWorker")).kill()
        process.join(300)
        assert process.exitcode == 0
    assert run.resumed_from()[0] >= before
    return run.losses()


def the_driver_is_killed(run_in: Callable[..., Run], cluster: Cluster, root: Path, moment_s: float) -> Losses:
    """First it is asked to pause, and goes on from there. At last it needs no Ray: nobody waits for more of its
    processes here.
    """
    run = run_in(root, 2, ray=True, environment=address(cluster))
    with run.begun() as process:
        wait_until(training(run), process)
        paused = run.paused(process, 120)
    with run.begun() as process:
        wait_until(lambda: len(run.losses()) > paused, process)
        time.sleep(moment_s)
        process.kill()
    wait_until_gone(cluster.process, "RayTrainWorker")
    before = run.committed()[-1]
    losses = dataclasses.replace(run, ray=False).to_the_end()
    assert run.resumed_from() == [paused, before]
    return losses


def the_node_is_killed(run_in: Callable[..., Run], _: Cluster, root: Path, moment_s: float) -> Losses:
    """Of a Ray of its own: the run ends with what was saved, or its worker was done before it knew. What goes on from
    there needs no Ray, and has the same losses.
    """
    run = run_in(root, ray=True)
    with run.begun() as process:
        wait_until(training(run), process)
        time.sleep(moment_s)
        assert process.pid is not None
        (raylet,) = of_ray(psutil.Process(process.pid), "raylet/raylet")
        workers = of_ray(psutil.Process(process.pid), "RayTrainWorker")
        raylet.kill()
        process.join(120)
        assert process.exitcode is not None
    _, left = psutil.wait_procs(workers, 60)  # they take a while to see it, and write their steps till then
    assert left == []
    if process.exitcode == 0:
        return run.losses()
    before = run.committed()[-1]
    losses = dataclasses.replace(run, ray=False).to_the_end()
    assert run.resumed_from() == [before]
    return losses


def wait_until_gone(ancestor: psutil.Process, name: str) -> None:
    until = time.monotonic() + 60
    while of_ray(ancestor, name):
        assert time.monotonic() < until, f"{name} outlives its driver"
        time.sleep(0.1)


@pytest.mark.parametrize("kill", range(KILLS))
def test_whoever_is_killed(
    kill: int, run_in: Callable[..., Run], ray_cluster: Cluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    victim = (a_worker_is_killed, the_driver_is_killed, the_node_is_killed)[kill % 3]
    whole: Losses = request.getfixturevalue("plain" if victim is the_node_is_killed else "of_two")
    moment_s = random.Random(time.time_ns()).uniform(0, 0.5)
    assert victim(run_in, ray_cluster, tmp_path, moment_s) == whole
