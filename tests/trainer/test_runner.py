"""What is refused before Ray starts, and how errors travel between processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from aim_trainer import runner
from aim_trainer.errors import DataError, JobError, ResourceError, StoreError
from aim_trainer.run_directory import RunDirectory
from aim_trainer.worker import Rows
from ports import free_ports
from tiny_runs import chat_tokens, tiny_job


def test_an_error_reaches_another_process_as_it_is() -> None:
    error = DataError("chat.jsonl:3: no answer", field="chat.jsonl", value=3, remedy="write one")
    told = pickle.loads(pickle.dumps(error))
    assert type(told) is DataError
    assert (str(told), vars(told)) == (str(error), vars(error))


def test_rocr_without_hip_is_said_before_ray_starts() -> None:
    with pytest.raises(ResourceError, match=r"^ROCR_VISIBLE_DEVICES=0,1 is set, .*; unset it: in a pod"):
        runner.check_visibility({"ROCR_VISIBLE_DEVICES": "0,1"})
    runner.check_visibility({"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "0,1"})
    runner.check_visibility({"HIP_VISIBLE_DEVICES": ""})


def test_several_workers_are_rays_business(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, workers=2)
    with pytest.raises(JobError, match=r"spec.distributed.workers: 2 workers .*; leave --no-ray out"):
        runner.train(job, RunDirectory(tmp_path), Rows(tmp_path, None, ""), ray=False)


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    job = tiny_job(tmp_path)
    spec = job.spec.model_copy(update={"resources": job.spec.resources.model_copy(update={"gpu": 1})})
    with pytest.raises(ResourceError, match=r"spec.resources.gpu: no GPU .*; set it to 0 to train on the CPU"):
        runner.train(job.model_copy(update={"spec": spec}), RunDirectory(tmp_path), Rows(tmp_path, None, ""), ray=False)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:PORT", r"nobody answers \(.*refused"),
        ("ray://127.0.0.1:PORT", r"nobody answers \(.*refused"),
        ("no-such-host.invalid:6379", r"nobody answers \("),
        ("127.0.0.1:99999", r"nobody answers \("),
        ("nonsense", "Invalid address format: nonsense"),
    ],
)
def test_a_cluster_that_does_not_answer_is_told_at_once(
    address: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    address = address.replace("PORT", str(port))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(
        ResourceError, match=rf"^RAY_ADDRESS: {address}: {told}.*; check that the cluster runs, or unset"
    ):
        runner.check(tiny_job(tmp_path), ray=True)


def test_a_cluster_that_has_too_little_is_waited_for_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = tiny_job(tmp_path, workers=3)
    runner.check_resources(job, {"CPU": 2.0}, alone=False)
    assert caplog.messages == ["the cluster has 2 CPUs, 3 are asked for: waiting for the rest"]
    caplog.clear()
    runner.check_resources(job, {"CPU": 3.0}, alone=False)
    assert caplog.messages == []


def test_a_machine_that_has_too_few_devices_is_refused(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, workers=2)
    spec = job.spec.model_copy(update={"resources": job.spec.resources.model_copy(update={"gpu": 2})})
    job = job.model_copy(update={"spec": spec})
    with pytest.raises(ResourceError, match=r"^spec.resources.gpu: 4 GPUs are asked for, this machine has 1; lower it"):
        runner.check_resources(job, {"GPU": 1}, alone=True)
    runner.check_resources(job, {"GPU": 4}, alone=True)


def test_rows_that_a_worker_cannot_see_are_said(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"rows: the tokenised rows are not there for this worker; put the run's"):
        runner.train(tiny_job(tiny("llama")), RunDirectory(tmp_path), Rows(tmp_path / "rows", None, ""), ray=False)


def test_the_directory_of_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    chat_tokens(tmp_path / "rows", 4)
    with pytest.raises(JobError, match=r"spec.baseModel.modelId: .*there is no such file or directory"):
        runner.train(tiny_job(tmp_path / "no"), RunDirectory(tmp_path), Rows(tmp_path / "rows", None, ""), ray=False)
