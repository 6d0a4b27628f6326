"""The parts of the vLLM engine that need no vLLM: flags, what is refused at once, threads, a child's last words."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_runtime.engines.base import EngineStats, ModelLoadError
from aim_runtime.engines.vllm.engine import (
    CPU_ENVIRONMENT,
    ENVIRONMENT,
    VllmEngine,
    check_model_dir,
    command_line,
    in_daemon_thread,
    set_environment,
)
from aim_runtime.engines.vllm.output import LONGEST_REASON, ChildOutput, is_second_hand, one_line


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--dtype", "float32"], ["--dtype", "float32"]),
        ({"dtype": "float32"}, ["--dtype=float32"]),
        ({"--max_num_seqs": 8}, ["--max-num-seqs=8"]),
        ({"enforce-eager": True, "enable_prefix_caching": False}, ["--enforce-eager", "--no-enable-prefix-caching"]),
        ({"seed": None}, []),
        ({"lora-modules": ["a=/a", "b=/b"]}, ["--lora-modules", "a=/a", "b=/b"]),
        ({"speculative_config": {"method": "ngram"}}, ["--speculative-config", '{"method": "ngram"}']),
        ({"override": "-1"}, ["--override=-1"]),
    ],
)
def test_engine_args_become_a_command_line(given: list[str] | dict[str, object], line: list[str]) -> None:
    assert command_line(given) == line


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere does not exist"):
        check_model_dir(tmp_path / "nowhere")


def test_a_directory_without_configuration_or_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        check_model_dir(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(ModelLoadError, match="has no weights"):
        check_model_dir(tmp_path)
    check_model_dir(tmp_path, ["--load-format=dummy"])
    (tmp_path / "model.safetensors").touch()
    check_model_dir(tmp_path)


async def test_an_engine_that_is_not_loaded_says_so() -> None:
    engine = VllmEngine("/nowhere", served_model_name="m")
    assert not engine.healthy()
    assert engine.operations == {}
    assert engine.stats() == EngineStats(0, 0, 0)
    with pytest.raises(RuntimeError, match="not loaded"):
        _ = engine.max_model_len
    with pytest.raises(ModelLoadError, match="/nowhere does not exist"):
        await engine.load()
    await engine.drain(1)
    await engine.close()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """None of the variables is set, and afterwards each is what it was before."""
    for name in (*ENVIRONMENT, *CPU_ENVIRONMENT):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_environment_is_a_default(environment: pytest.MonkeyPatch) -> None:
    environment.setattr("aim_runtime.engines.vllm.engine.is_cpu_build", lambda: True)
    environment.setenv("OMP_WAIT_POLICY", "active")
    set_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["VLLM_TARGET_DEVICE"] == "cpu"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_a_gpu_build_gets_no_cpu_settings(environment: pytest.MonkeyPatch) -> None:
    environment.setattr("aim_runtime.engines.vllm.engine.is_cpu_build", lambda: False)
    set_environment()
    assert not set(CPU_ENVIRONMENT) & set(os.environ)


async def test_loading_leaves_the_loop_free_and_its_error_arrives() -> None:
    released = threading.Event()
    work = asyncio.create_task(in_daemon_thread(lambda: released.wait(10)))
    await asyncio.sleep(0)
    assert not work.done()
    released.set()
    assert await work

    def fail() -> None:
        raise ModelLoadError("no")

    with pytest.raises(ModelLoadError, match="no"):
        await in_daemon_thread(fail)


async def test_cancelled_loading_does_not_wait_for_its_thread() -> None:
    released = threading.Event()
    work = asyncio.create_task(in_daemon_thread(lambda: released.wait(10)))
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(work, 1)
    released.set()


def child(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], check=False)


def cause_of(script: str) -> str | None:
    with ChildOutput() as output:
        child(script)
        return output.cause()


def test_a_child_s_output_passes_through_unchanged(capfd: pytest.CaptureFixture[str]) -> None:
    script = "import sys; print('to stdout'); print('né \\N{SNOWMAN}', file=sys.stderr); sys.stdout.write('no newline')"
    with ChildOutput() as output:
        child(f"import os; os.environ['PYTHONIOENCODING'] = 'utf-8'; {script}")
        assert output.cause() is None
    print("after")
    out, err = capfd.readouterr()
    assert out == "to stdout\nno newlineafter\n"
    assert err == "né ☃\n"


def test_the_first_exception_of_a_child_is_the_cause(capfd: pytest.CaptureFixture[str]) -> None:
    assert cause_of("raise ValueError('KV cache too small')") == "ValueError: KV cache too small"
    logged = "(Worker pid=7) ERROR 11-21 10:00:00 [gpu_worker.py:99] torch.OutOfMemoryError: HIP out of memory"
    second = "(EngineCore pid=3) ERROR 11-21 10:00:01 [core.py:1] Exception: WorkerProc initialization failed due to"
    assert cause_of(f"print({logged!r}); print({second!r})") == "torch.OutOfMemoryError: HIP out of memory"
    capfd.readouterr()


def test_what_only_looks_like_an_exception_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    harmless = (
        "(Worker pid=7) WARNING 11-21 10:00:00 [import.py:1] ImportError: no module named foo, going on without",
        "(Worker pid=7) ERROR 11-21 10:00:00 [x.py:1]     raise ValueError: indented is a traceback's inside",
        "INFO: Error handling: enabled",
    )
    assert cause_of(f"[print(line) for line in {harmless!r}]") is None
    capfd.readouterr()


def test_a_long_output_does_not_block_the_child(capfd: pytest.CaptureFixture[str]) -> None:
    """Longer than a pipe's 64 KiB, with the cause split over reads."""
    assert cause_of("print('x' * 300_000 + '\\n' + 'y' * 70_000); raise OSError('disk')") == "OSError: disk"
    out, _ = capfd.readouterr()
    assert len(out) == 370_002


@given(st.text())
def test_a_reason_is_one_short_line(text: str) -> None:
    line = one_line(RuntimeError(text))
    assert len(line.splitlines()) <= 1
    assert len(line) <= LONGEST_REASON + 1


def test_pydantic_s_frame_is_left_out() -> None:
    class Model(pydantic.BaseModel):
        @pydantic.model_validator(mode="before")
        @classmethod
        def refuse(cls, data: object) -> object:
            raise ValueError("architecture Foo is not supported. Supported architectures: dict_keys(['A', 'B'])")

    with pytest.raises(pydantic.ValidationError) as caught:
        Model.model_validate({})
    assert one_line(caught.value) == "architecture Foo is not supported."
    assert not is_second_hand(caught.value)
    assert is_second_hand(RuntimeError("Engine core initialization failed. See root cause above."))
