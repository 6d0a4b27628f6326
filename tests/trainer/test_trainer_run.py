"""The whole way of a run by its verb, on a tiny model: data, training, judgement, publication, page; and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from aim_trainer import run as driver
from aim_trainer.cli import run as cli_run
from aim_trainer.cli.app import app
from aim_trainer.job.read import read_job
from aim_trainer.metrics.json_lines import read_records
from aim_trainer.metrics.records import Note, Step
from aim_trainer.run_directory import RunDirectory
from tiny_models import conversations

STEPS = 24


def job_file(directory: Path, model: Path, **spec: object) -> Path:
    rows = directory / "chat.jsonl"
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations(40, 0)))
    job = {
        "apiVersion": "aim.amd.com/v1alpha1",
        "kind": "FineTuningJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "baseModel": {"modelId": str(model)},
            "dataset": {"source": str(rows), "validation": {"share": 0.1}},
            "hyperparameters": {
                "batchSize": "auto",
                "globalBatchSize": 4,
                "maxSteps": STEPS,
                "maxSeqLength": 128,
                "learningRate": 0.005,
                "loraDropout": 0.1,
            },
            "checkpoints": {"everySteps": 6},
            "validation": {"samples": 2, "maxNewTokens": 4},
            "output": {"profile": "none"},
            **spec,
        },
    }
    file = directory / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def asked(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def steps(run: Path) -> dict[int, str]:
    told = [told.record for told in read_records(run / "metrics.jsonl")]
    return {record.step: record.loss.hex() for record in told if isinstance(record, Step)}


def notes(run: Path) -> list[str]:
    return [told.record.kind for told in read_records(run / "metrics.jsonl") if isinstance(told.record, Note)]


def test_the_whole_way_paused_and_resumed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    job = job_file(tmp_path, tiny("llama"))
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    done = asked("run", job, "--directory", whole)
    assert done.exit_code == 0, done.output
    losses = steps(whole)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert float.fromhex(losses[STEPS]) < float.fromhex(losses[1])
    assert json.loads((whole / "evaluation.json").read_bytes())["delta"]["eval_loss"] < 0
    assert "<svg" in (whole / "report.html").read_text()
    assert (whole / "published/v1/adapter_model.safetensors").is_file()
    assert notes(whole)[-1] == "done"
    assert re.search(r"\d+ rows to train on, \d+ held out; [\d,]+ tokens, \d+\.\d% of them trained", done.output)
    assert re.search(r"<\|im_start\|>assistant\s+⟦[^⟧]+<\|im_end\|>⟧", done.output)

    said: list[str] = []

    def pause_after_some_steps() -> None:
        while len(steps(paused)) < 8:
            time.sleep(0.01)
        said.append(cli_run.pause(paused, 300))  # in this process: another begins after the run has ended

    assert "no process is at this run" in asked("pause", paused).output
    asking = threading.Thread(target=pause_after_some_steps, daemon=True)
    asking.start()
    stopped = asked("run", job, "--directory", paused)
    assert stopped.exit_code == 143, stopped.output
    asking.join()
    assert said == [f"{paused}: paused; aim-trainer resume {paused} goes on"]
    assert notes(paused)[-1] == "paused"
    assert 8 <= len(steps(paused)) < STEPS
    assert not (paused / "published").exists()
    resumed = asked("resume", paused)
    assert resumed.exit_code == 0, resumed.output
    assert "resumed" in notes(paused)
    assert steps(paused) == losses
    assert (paused / "published/v1/adapter_model.safetensors").is_file()


def test_a_gate_that_fails_publishes_nothing(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    job = job_file(tmp_path, tiny("llama"), validation={"samples": 1, "gates": [{"metric": "eval_loss", "max": 0.001}]})
    failed = asked("run", job, "--directory", tmp_path / "run", "--set", "spec.hyperparameters.maxSteps=2")
    assert failed.exit_code == 4, failed.output
    assert "eval_loss" in failed.output
    assert notes(tmp_path / "run")[-2:] == ["judged", "failed"]
    assert json.loads(asked("status", tmp_path / "run", "-o", "json").stdout)["state"] == "failed"
    assert (tmp_path / "run/report.html").is_file()
    assert not (tmp_path / "run/published").exists()


def test_a_signal_ends_what_is_made_again_at_once(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """While a model is judged: no answer is waited for, nothing is published, and the run goes on later."""
    job = job_file(
        tmp_path, tiny("llama"), dataset={"source": str(tmp_path / "chat.jsonl"), "validation": {"share": 0.5}}
    )
    long = ("--set", "spec.validation.samples=40", "--set", "spec.validation.maxNewTokens=400")
    run = tmp_path / "run"

    def once_it_is_judged() -> None:
        while "judging" not in notes(run):
            time.sleep(0.01)
        time.sleep(0.5)  # that it is told everywhere; answers take longer
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=once_it_is_judged, daemon=True)
    asking.start()
    stopped = asked("run", job, "--directory", run, "--set", "spec.hyperparameters.maxSteps=2", *long)
    assert stopped.exit_code == 143, stopped.output
    asking.join()
    assert notes(run)[-2:] == ["judging", "paused"]
    assert not (run / "evaluation.json").exists()
    assert not (run / "published").exists()
    assert not (run / "stop").exists()
    assert asked("resume", run, "--set", "spec.validation.samples=1").exit_code == 0
    assert notes(run)[-1] == "done"


def test_what_a_killed_driver_left_is_cleared_away(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    job, run = job_file(tmp_path, tiny("llama")), tmp_path / "run"
    left = [run / "data/train/5eed.0.part", run / ".publishing-x1"]
    for directory in left:
        directory.mkdir(parents=True)
        (directory / "rows.bin").write_bytes(b"half")
    done = asked("run", job, "--directory", run, "--set", "spec.hyperparameters.maxSteps=2")
    assert done.exit_code == 0, done.output
    assert not any(directory.exists() for directory in left)


def test_a_gpu_that_is_not_there_is_told_before_anything_is_begun(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    job = job_file(tmp_path, tiny("llama"))
    for how in ("--no-ray", "--ray"):
        refused = asked("run", job, "--directory", tmp_path / "run", "--set", "spec.resources.gpu=1", how)
        assert refused.exit_code == 3, refused.output
        assert "set it to 0" in refused.output or "this machine has 0; lower it" in refused.output
    assert not (tmp_path / "run").exists()


def test_bad_regression_prompts_stop_a_run_before_it_begins(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "contains": "b"}\n{"prompt": "a"}\n')
    judged = {"metrics": ["eval_loss", "regressions"], "regressionPrompts": str(prompts)}
    job = job_file(tmp_path, tiny("llama"), validation=judged)
    for verb in (("run", job, "--directory", tmp_path / "run"), ("validate", job)):
        refused = asked(*verb)
        assert refused.exit_code == 2
        assert f"{prompts}:2: give one of expected, contains and matches" in refused.output
    assert not (tmp_path / "run").exists()
    prompts.write_text('{"prompt": "a", "contains": "b"}\n')
    assert f"{prompts}: 1 regression prompts" in asked("validate", job).output


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"output": {"registry": "/dev/null/models"}}, "spec.output.registry: /dev/null/models"),
        ({"checkpoints": {"uri": "/dev/null/kept"}}, "spec.checkpoints.uri: /dev/null/kept"),
        ({"output": {"guardrailPolicy": "/none.yaml"}}, "/none.yaml: no such file"),
    ],
)
def test_a_place_that_takes_nothing_stops_a_run_before_it_begins(
    tiny: Callable[[str], Path], tmp_path: Path, spec: dict[str, object], told: str
) -> None:
    job = job_file(tmp_path, tiny("llama"), **spec)
    for verb in (("run", "--no-ray"), ("run", "--ray"), ("validate", "--places")):
        where = ("--directory", tmp_path / "run") if verb[0] == "run" else ()
        refused = asked(*verb, job, *where)
        assert refused.exit_code == 3
        assert told in refused.output
    assert not (tmp_path / "run").exists()
    assert asked("validate", job).exit_code == 0


def test_places_that_can_be_written_to_are_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoints, models = tmp_path / "checkpoints", tmp_path / "models"
    job = job_file(tmp_path, tiny("llama"), checkpoints={"uri": str(checkpoints)}, output={"registry": str(models)})
    named = asked("validate", "--places", job).output
    assert f"{checkpoints}: can be written to\n{models}: can be written to\n" in named
    assert not [path for place in (checkpoints, models) for path in place.rglob("*") if path.is_file()]


def test_what_is_not_begun(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    job = job_file(tmp_path, tiny("llama"))
    refused = asked("run", job, "--set", "spec.suspend=true", "--directory", tmp_path / "run")
    assert (refused.exit_code, refused.output) == (
        2,
        "spec.suspend: the job is suspended; set it to false, or run with --set spec.suspend=false\n",
    )
    nothing = asked("resume", tmp_path / "none")
    assert nothing.exit_code == 3
    assert "no run is there; begin one: aim-trainer run JOB" in nothing.output
    assert asked("pause", "/dev/null").output == (
        "/dev/null: Not a directory; name the directory of a run, as who may write there\n"
    )
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "assistent", "content": "Hi"}]}\n')
    bad = asked("run", job, "--directory", tmp_path / "run")
    assert bad.exit_code == 2
    assert bad.output.count("chat.jsonl:1: messages[0].role") == 1
    (told,) = read_records(tmp_path / "run/metrics.jsonl")
    assert isinstance(told.record, Note)
    assert told.record.kind == "failed"
    assert told.record.message in bad.output
    assert "chat.jsonl:1: messages[0].role" in (tmp_path / "run/report.html").read_text()


def test_a_directory_is_one_runs(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    import fcntl

    job, run = job_file(tmp_path, tiny("llama")), tmp_path / "run"
    run.mkdir()
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        busy = asked("run", job, "--directory", run)
    assert busy.exit_code == 3
    assert "another process is at this run; wait for it" in busy.output
    (run / "job.yaml").write_text(job.read_text().replace("0.005", "0.001"))
    other = asked("run", job, "--directory", run)
    assert other.exit_code == 3
    assert "holds a run of a job with other data, model or hyperparameters; name another" in other.output


def test_what_the_disk_says_is_told_in_a_line(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    (directory / "job.yaml").mkdir(parents=True)
    done = asked("run", job_file(tmp_path, tiny("llama")), "--directory", directory)
    assert (done.exit_code, done.output) == (3, f"{directory}/job.yaml: Is a directory; check the disk or volume\n")


def test_a_run_that_died_while_it_kept_the_tokenizer_goes_on(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = read_job(job_file(tmp_path, tiny("llama"))), RunDirectory(tmp_path / "run")
    run.root.mkdir()

    class Dies:
        def save_pretrained(self, into: Path) -> None:
            into.mkdir()
            (into / "tokenizer_config.json").write_text("{")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver, "read_tokenizer", lambda _: Dies())
        with pytest.raises(KeyboardInterrupt):
            driver._rows(job, run)
    assert driver._rows(job, run).train.is_dir()
    assert [path.name for path in run.root.glob("tokenizer*")] == ["tokenizer"]
