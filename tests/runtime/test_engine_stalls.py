"""An engine whose decode thread is there but does not come back: said, refused, and ended in time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from aim_kserve.server import ENDING_S, LATE_S, drain_time_s
from aim_runtime.engines.llama_cpp.progress import MOST_BETWEEN_LOOKS_S, AwakeClock, Progress
from served import Served

WEDGED = Path(__file__).parents[1] / "fakes/wedged_runtime.py"
WEDGE = {"prompt": "hi", "response_format": {"type": "json_object"}}


def test_progress_is_time_since_the_last_step_with_work():
    now = 0.0
    progress = Progress(lambda: now)
    assert progress.stalled_s == 0
    progress.advance()
    now = 3.0
    assert progress.stalled_s == 3
    progress.advance()
    assert progress.stalled_s == 0
    now = 9.0
    progress.rest()
    now = 99.0
    assert progress.stalled_s == 0


def test_time_in_which_the_whole_process_was_stopped_is_no_standstill():
    now = 0.0
    progress = Progress(AwakeClock(lambda: now))
    progress.advance()
    for _ in range(90):  # looked at every second, and nothing moves
        now += 1
        stalled_s = progress.stalled_s
    assert stalled_s == 90
    progress.advance()
    now += 3600  # the container was paused
    assert progress.stalled_s == MOST_BETWEEN_LOOKS_S
    now += 1
    assert progress.stalled_s == MOST_BETWEEN_LOOKS_S + 1


@pytest.mark.parametrize(("grace_s", "drain_s"), [(30, 27), (4, 2), (1, 0.5), (0, 0)])
def test_ending_has_its_share_of_the_grace_period(grace_s: float, drain_s: float):
    assert drain_time_s(grace_s) == drain_s
    assert ENDING_S > 0
    assert LATE_S > 0


def wedged(model: Path, *flags: str) -> Served:
    """With its engine in the server's own process."""
    told = ["--model_name", "m", "--model_dir", str(model.parent), "--threads", "1", "--max_model_len", "512"]
    return Served([str(WEDGED), *told, "--supervise", "never", *flags])


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def wedge(server: Served, pool: ThreadPoolExecutor) -> Future[httpx.Response]:
    """Ask what makes it stand still; returns once it does."""
    asked = pool.submit(httpx.post, f"{server.url}/v1/completions", json=WEDGE, timeout=60)
    while running(server, "aim_requests_running") == running(server, "aim_requests_waiting") == 0:
        assert not asked.done(), asked.result().text
        time.sleep(0.02)
    return asked


def running(server: Served, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


@pytest.mark.model
def test_a_loop_that_stands_still_is_unhealthy_and_everyone_is_told(embedded_model: Path, pool: ThreadPoolExecutor):
    with wedged(embedded_model, "--stall_timeout", "1", "--grace_period", "30") as server:
        asked = wedge(server, pool)
        server.wait_status("/v2/health/ready", 503)
        assert asked.result(30).status_code == 503
        assert int(asked.result().headers["retry-after"]) >= 1
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "hi"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "has not moved for" in refused.json()["error"]["message"]
        assert running(server, "aim_engine_stalled_seconds") >= 1
        server.terminate()
        assert server.exit_code(20) == 1  # known to stand still: not waited for
        assert server.stderr().splitlines()[-1].startswith("error: model m: the decode thread has not moved for")
        assert "Traceback" not in server.stderr()


@pytest.mark.model
def test_a_loop_that_stands_still_unnoticed_ends_within_the_grace_period(
    embedded_model: Path, pool: ThreadPoolExecutor
):
    with wedged(embedded_model, "--stall_timeout", "600", "--grace_period", "6") as server:
        asked = wedge(server, pool)
        server.terminate()
        assert server.exit_code(6 + LATE_S + 10) == 1
        assert "error: model m: the decode thread has not moved for" in server.stderr()
        assert asked.result(10).status_code == 503


@pytest.mark.model
@pytest.mark.parametrize("prompt", ["<|im_end|>" * 200_000, "<|im_end|> x" * 50_000], ids=["too long", "long"])
def test_a_client_that_leaves_while_its_prompt_is_read_breaks_no_shutdown(embedded_model: Path, prompt: str):
    flags = ["--model_name", "m", "--model_dir", str(embedded_model.parent), "--threads", "1"]
    with Served(["-m", "aim_runtime", *flags]) as server:
        with pytest.raises(httpx.ReadTimeout) if "x" in prompt else contextlib.nullcontext():
            answer = httpx.post(
                f"{server.url}/v1/completions", json={"prompt": prompt}, timeout=httpx.Timeout(9, read=0.5)
            )
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"
        server.terminate()
        assert server.exit_code(30) == 0
        assert "Traceback" not in server.stderr()
