"""What a job takes, where it fits, how long it lasts: told before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from aim_profile.plans.workload import parse_workloads
from aim_profile.sizing.training import memory
from aim_trainer.cli.app import app
from aim_trainer.job.memory import batch_that_fits, facts_of, needed, training_of
from aim_trainer.job.read import read_job
from aim_trainer.metrics.json_lines import JsonLines
from aim_trainer.metrics.records import Step

JOB = """\
apiVersion: aim.amd.com/v1alpha1
kind: FineTuningJob
metadata: {name: bot}
spec:
  baseModel: {modelId: Qwen/Qwen3-8B}
  method: qlora
  dataset: {source: "chats.jsonl", validation: {share: 0}}
  hyperparameters: {batchSize: 4, globalBatchSize: 32, maxSeqLength: 4096, loraRank: 32}
  distributed: {workers: 2}
  resources: {gpu: 1}
"""
ROW = '{"messages": [{"role": "user", "content": "a%d"}, {"role": "assistant", "content": "b"}]}\n'
ROWS = "".join(ROW % at for at in range(100))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "chats.jsonl").write_text(ROWS)
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("chats.jsonl", str(tmp_path / "chats.jsonl")))
    return file


def planned(job: Path, *options: str) -> Any:
    done = CliRunner().invoke(app, ["plan", str(job), "-o", "json", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_job_is_sized_as_it_says(job: Path) -> None:
    read = read_job(job)
    training = training_of(read)
    assert (training.method, training.batch, training.context, training.lora_rank) == ("qlora", 4, 4096, 32)
    assert (training.workers, training.accumulation, training.precision) == (2, 4, "bf16")
    assert needed(read, facts_of(read)) == memory(facts_of(read), training)


def test_every_mode_of_a_gpu_says_whether_it_holds_it(job: Path) -> None:
    made = planned(job, "--gpu", "MI300X")
    by_mode = {place["mode"]: place for place in made["places"]}
    assert by_mode["SPX/NPS1"]["fits"] is True
    assert by_mode["CPX/NPS4"]["fits"] is False
    short = made["memory"]["total_gib"] - 0.9 * by_mode["CPX/NPS4"]["device_gib"]
    assert by_mode["CPX/NPS4"]["short_gib"] == pytest.approx(short, abs=0.01)
    assert made["memory"]["weights_gib"] == pytest.approx(5.6, abs=0.5)


def test_without_a_gpu_the_smallest_device_of_each_is_named(job: Path) -> None:
    places = planned(job)["places"]
    assert len({place["gpu"] for place in places}) == len(places) > 5
    assert next(place["mode"] for place in places if place["gpu"] == "MI300X") not in ("SPX/NPS1", "CPX/NPS4")


def test_a_job_without_gpus_is_planned_for_the_one_that_is_asked_about(job: Path) -> None:
    cpu = planned(job, "--set", "spec.resources.gpu=0")
    gpu = planned(job, "--set", "spec.resources.gpu=0", "--gpu", "MI300X")
    assert (cpu["places"], gpu["places"]) == ([], planned(job, "--gpu", "MI300X")["places"])
    assert cpu["memory"]["activations_gib"] > gpu["memory"]["activations_gib"]  # fp32 beside bf16


def test_steps_are_of_the_rows_that_are_there(job: Path) -> None:
    made = planned(job)
    assert (made["rows"], made["steps"]["steps"], made["steps"]["accumulation"]) == (100, 4, 4)
    held = planned(job, "--set", "spec.dataset.validation.share=0.25")
    assert (held["rows"], held["steps"]["steps"]) == (75, 3)
    assert planned(job, "--rows", "3200")["steps"]["steps"] == 100
    packed = planned(job, "--set", "spec.dataset.packing=true")
    assert (packed["rows"], packed["steps"].partition(":")[0]) == (None, "unknown")


def test_rows_that_are_wrong_are_told_as_by_a_run(job: Path) -> None:
    (job.parent / "chats.jsonl").write_text(ROW % 0 + "{}\n")
    done = CliRunner().invoke(app, ["plan", str(job)])
    assert (done.exit_code, "chats.jsonl:2" in done.output) == (2, True)


def test_a_batch_that_is_found_divides_the_global_one_and_is_the_largest(job: Path) -> None:
    read = read_job(job, ["spec.hyperparameters.batchSize=auto"])
    facts, device = facts_of(read), 48 * 2**30
    rows = batch_that_fits(read, facts, device)
    assert rows > 1
    assert 16 % rows == 0
    assert needed(read, facts, rows).total <= 0.9 * device < needed(read, facts, 2 * rows).total
    assert batch_that_fits(read, facts, 8 * 2**30) == 0


def test_what_would_make_it_fit_is_tried_not_guessed(job: Path) -> None:
    asked = ["--gpu", "MI300X", "--set", "spec.baseModel.modelId=meta-llama/Llama-3.3-70B-Instruct"]
    asked += ["--set", "spec.method=full", "--set", "spec.hyperparameters.loraRank=null", "-o", "json"]
    done = CliRunner().invoke(app, ["plan", str(job), *asked])
    made = json.loads(done.stdout)
    assert (done.exit_code, any(place["fits"] for place in made["places"])) == (3, False)
    assert "--set spec.method=qlora" in made["would_help"]
    assert "--set spec.hyperparameters.batchSize=1" not in made["would_help"]
    for change in made["would_help"]:
        again = CliRunner().invoke(app, ["plan", str(job), *asked, *change.split()])
        assert any(place["fits"] for place in json.loads(again.stdout)["places"]), change


def test_time_is_unknown_until_it_is_measured(job: Path, tmp_path: Path) -> None:
    assert planned(job)["time"].startswith("unknown: nothing is measured")
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.yaml").write_text(job.read_text())
    metrics = JsonLines(run / "metrics.jsonl")
    for at in range(1, 9):
        metrics.tell(Step(at, 8, 1.0, 2.0, 1e-4, 1.0, 100, 50, 60.0 if at < 4 else 30.0, 1.0))
    assert planned(job, "--measured", str(run))["time"].startswith("2 min 0 s: 4 steps of 30.00 s")
    other = ["plan", str(job), "--measured", str(run), "--set", "spec.hyperparameters.maxSeqLength=512"]
    refused = CliRunner().invoke(app, other)
    assert (refused.exit_code, "hyperparameters.max_seq_length is 4096 there, 512 here" in refused.output) == (2, True)


def test_a_job_is_a_workload_of_the_planner(job: Path) -> None:
    printed = CliRunner().invoke(app, ["plan", str(job), "--workload"]).stdout
    (workload,) = parse_workloads(printed).workloads
    assert (workload.name, workload.kind, workload.replicas) == ("bot", "finetune", 2)
    assert workload.training == training_of(read_job(job))
    assert "accumulation" in yaml.safe_load(printed)["workloads"][0]["training"]


def test_a_model_that_is_not_known_is_refused(job: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(job), "--set", "spec.baseModel.modelId=org/none"])
    assert (done.exit_code, "org/none is not in the catalogue" in done.output) == (2, True)
