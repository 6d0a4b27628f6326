"""kill -9 and SIGTERM at any moment: the run goes on from its newest whole checkpoint, to the same losses, bit by bit.

`SOAK_TRAINER_KILLS=N`: so many random moments (`make soak`).
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from killed_runs import Run, wait_until
from ports import free_ports
from rclone_servers import S3_ENVIRONMENT, s3_server
from tiny_runs import chat_tokens, tiny_job

KILLS = int(os.environ.get("SOAK_TRAINER_KILLS", "3"))
STEPS, EVERY = 40, 4
Losses = dict[int, tuple[str, str]]


@pytest.fixture(scope="module")
def run_in(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Run]:
    rows = tmp_path_factory.mktemp("rows")
    chat_tokens(rows, 40)
    job = tiny_job(tiny("llama"), maxSteps=STEPS, everySteps=EVERY, loraDropout=0.2, globalBatchSize=8)
    return lambda root: Run(job, rows, root)


@pytest.fixture(scope="module")
def uninterrupted(run_in: Callable[[Path], Run], tmp_path_factory: pytest.TempPathFactory) -> Losses:
    losses = run_in(tmp_path_factory.mktemp("whole")).to_the_end()
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert len(set(losses.values())) == STEPS
    return losses


def test_killed_at_random_moments(run_in: Callable[[Path], Run], uninterrupted: Losses, tmp_path: Path) -> None:
    chance = random.Random(time.time_ns())
    run = run_in(tmp_path / "0")
    for kill in range(KILLS):
        if len(run.committed()) and max(run.committed()) == STEPS:  # it came through: the next one begins anew
            assert run.losses() == uninterrupted
            run = run_in(tmp_path / str(kill))
        kill_a_while_after_its_first_step(run, chance.uniform(0, 1.5))
        print(f"killed after {sorted(run.losses())[-1:]}, whole are {run.committed()}")
    assert run.to_the_end() == uninterrupted


def kill_a_while_after_its_first_step(run: Run, seconds: float) -> None:
    begun = len(run.losses())
    with run.begun() as process:
        wait_until(lambda: not process.is_alive() or len(run.losses()) != begun, process)
        time.sleep(seconds)
        process.kill()


def test_killed_right_after_a_checkpoint(run_in: Callable[[Path], Run], uninterrupted: Losses, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    with run.begun() as process:
        wait_until(lambda: 2 * EVERY in run.committed(), process)
        process.kill()
    (at,) = run.committed()[-1:]
    assert run.to_the_end() == uninterrupted
    assert run.resumed_from() == [at]


def test_a_checkpoint_that_is_torn_or_corrupt_is_not_resumed_from(
    run_in: Callable[[Path], Run], uninterrupted: Losses, tmp_path: Path
) -> None:
    run = run_in(tmp_path)
    with run.begun() as process:
        wait_until(lambda: 3 * EVERY in run.committed(), process)
        process.kill()
    *_, before, newest = run.committed()
    (weights,) = run.directory.checkpoints.glob(f"*/step-{newest:06d}/*/weights.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run.to_the_end() == uninterrupted
    assert run.resumed_from() == [before]


def test_sigterm_ends_the_step_and_saves_it(
    run_in: Callable[[Path], Run], uninterrupted: Losses, tmp_path: Path
) -> None:
    run = run_in(tmp_path)
    with run.begun() as process:
        wait_until(lambda: len(run.losses()) >= EVERY + 1, process)
        paused = run.paused(process, 60)
    assert not run.directory.stop.exists()
    assert run.to_the_end() == uninterrupted
    assert run.resumed_from() == [paused]


def test_a_run_that_ended_is_only_written_again(run_in: Callable[[Path], Run], tmp_path: Path) -> None:
    run = run_in(tmp_path)
    losses = run.to_the_end()
    result = run.directory.result / "adapter_model.safetensors"
    weights = result.read_bytes()
    result.unlink()
    assert run.to_the_end() == losses
    assert result.read_bytes() == weights


def test_s3_that_is_cut_off_while_it_trains_loses_nothing(
    run_in: Callable[[Path], Run], uninterrupted: Losses, tmp_path: Path
) -> None:
    """Of 6 s here, of 30 s in `make soak`: then the run goes on, and every step stands once."""
    (tmp_path / "s3/bucket").mkdir(parents=True)
    (port,) = free_ports(1)
    whole = run_in(tmp_path / "run")
    checkpoints = whole.job.spec.checkpoints.model_copy(update={"uri": "s3://bucket/tiny"})
    job = whole.job.model_copy(update={"spec": whole.job.spec.model_copy(update={"checkpoints": checkpoints})})
    run = Run(
        job, whole.rows, whole.root, environment=S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    )
    with contextlib.ExitStack() as until_cut:
        until_cut.enter_context(s3_server(tmp_path / "s3", port, written_to=True))
        with run.begun() as process:
            wait_until(lambda: len(run.losses()) > EVERY, process)
            until_cut.close()
            steps = len(run.losses())
            time.sleep(30 if "SOAK_TRAINER_KILLS" in os.environ else 6)
            assert process.is_alive()
            assert len(run.losses()) <= steps + EVERY + 1
            with s3_server(tmp_path / "s3", port, written_to=True):
                process.join(120)
    assert process.exitcode == 0
    assert run.losses() == uninterrupted
    assert run.resumed_from() == []
    assert len(list((tmp_path / "s3").glob(f"bucket/tiny/*/step-{STEPS:06d}/COMMIT.json"))) == 1
