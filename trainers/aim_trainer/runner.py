"""Where a run's workers are: in this process, or in processes of Ray's. Beside the search, all that knows Ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from aim_trainer.errors import JobError, ResourceError, TrainerError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.metrics import sinks
from aim_trainer.metrics.records import Note
from aim_trainer.recipe.train import Outcome
from aim_trainer.recipe.workers import Workers
from aim_trainer.run_directory import RunDirectory
from aim_trainer.worker import Rows, work

_log = logging.getLogger(__name__)
Result = TypeVar("Result")
_ANSWERS_WITHIN_S = 5
#: Nodes that are on their way are waited for. Ray would count each minute as a failure of its controller, and try
#: again for ever, as it does where workers die while they begin: of those we count.
_WAITS_FOR_NODES_S = str(365 * 86_400)


def train(job: FineTuningJob, run: RunDirectory, rows: Rows, *, ray: bool) -> Outcome:
    """Until the last step, or until there is a file `run.stop`: then the step at hand is ended and saved.

    ray: as workers of Ray's, of the cluster at RAY_ADDRESS or one of this machine alone. Raises TrainerError.
    """
    check(job, ray=ray)
    if ray:
        return _under_ray(job, run, rows)
    return work(job, run, rows, Workers(device=device_of(job)), run.stop.exists)


def check(job: FineTuningJob, *, ray: bool) -> None:
    """What can be known to be lacking before rows are read and Ray is started. Raises JobError, ResourceError."""
    asked = job.spec.distributed
    if ray:
        check_visibility(os.environ)
        if address := os.environ.get("RAY_ADDRESS"):
            _check_answers(address)
            connect(job)
        if job.spec.resources.gpu and "RAY_ADDRESS" not in os.environ:
            import torch

            check_resources(job, {"GPU": torch.cuda.device_count()}, alone=True)
        return
    if asked.workers > 1:
        raise JobError(
            f"spec.distributed.workers: {asked.workers} workers are Ray's business",
            field="spec.distributed.workers",
            value=asked.workers,
            remedy="leave --no-ray out, or set it to 1 with hyperparameters.globalBatchSize as it is",
        )
    device_of(job)


def _check_answers(address: str) -> None:
    """Ray itself waits minutes for one that is away. Raises ResourceError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # auto, local, or nothing that Ray knows: it tells at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWERS_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, f"nobody answers ({error})") from error


def _no_cluster(address: str, why: str) -> ResourceError:
    return ResourceError(
        f"RAY_ADDRESS: {address}: {why}",
        field="RAY_ADDRESS",
        value=address,
        remedy="check that the cluster runs, or unset RAY_ADDRESS to train on this machine alone",
    )


def device_of(job: FineTuningJob) -> str:
    """This process's. Raises ResourceError where the job wants a GPU and there is none."""
    import torch

    if not job.spec.resources.gpu:
        return "cpu"
    if not torch.cuda.is_available():
        raise ResourceError(
            "spec.resources.gpu: no GPU that torch can use is here",
            field="spec.resources.gpu",
            value=job.spec.resources.gpu,
            remedy="set it to 0 to train on the CPU, or look at the driver and at torch's build",
        )
    return "cuda:0"


def call(job: FineTuningJob, function: Callable[..., Result], *arguments: Any, ray: bool) -> Result:
    """Calls it where a worker's devices are: here, or on a node that Ray finds. Raises what it raises."""
    if not (ray and job.spec.resources.gpu):
        return function(*arguments)
    connect(job)
    from ray import get, remote
    from ray.exceptions import RayTaskError

    asked = job.spec.resources
    there = remote(num_cpus=asked.cpu, num_gpus=asked.gpu)(function)
    try:
        result: Result = get(there.remote(*arguments))
    except RayTaskError as failed:
        if isinstance(failed.cause, TrainerError):
            raise failed.cause from failed
        raise
    return result


def check_visibility(environment: Mapping[str, str]) -> None:
    """Raises ResourceError for what Ray would end every worker for, on AMD's GPUs."""
    rocr = environment.get("ROCR_VISIBLE_DEVICES")
    if rocr is not None and "HIP_VISIBLE_DEVICES" not in environment:
        raise ResourceError(
            f"ROCR_VISIBLE_DEVICES={rocr} is set, and Ray deals out GPUs by HIP_VISIBLE_DEVICES alone",
            field="ROCR_VISIBLE_DEVICES",
            value=rocr,
            remedy="unset it: in a pod the device plugin says what is seen; elsewhere set HIP_VISIBLE_DEVICES instead",
        )


def _under_ray(job: FineTuningJob, run: RunDirectory, rows: Rows) -> Outcome:
    """Ray's own retries are of preempted nodes; of losses we count, for what a person did wrong is not tried again."""
    connect(job)
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    lost = 0
    while True:
        try:
            return _fitted(job, run, rows)
        except (TrainingFailedError, RayError) as failed:  # a worker, or what Ray itself watches them by
            problem = _told_by_workers(failed)
            if problem is not None:
                raise problem from failed
            lost += 1
            if lost > job.spec.distributed.max_failures:
                raise _given_up(job, lost, failed) from failed
            most = job.spec.distributed.max_failures
            told = f"workers were lost ({_last_line(failed)}), {lost} of {most} times that are survived"
            sinks.beside(run).tell(Note("retried", f"{told}: from the newest checkpoint"))


def _fitted(job: FineTuningJob, run: RunDirectory, rows: Rows) -> Outcome:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    asked = job.spec.resources
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"job": job, "run": run, "rows": rows, "directory": os.getcwd()},
        scaling_config=ScalingConfig(
            num_workers=job.spec.distributed.workers,
            use_gpu=asked.gpu > 0,
            resources_per_worker={"CPU": asked.cpu} | ({"GPU": asked.gpu} if asked.gpu else {}),
        ),
        # A name of its own each time: what Ray remembers of checkpoints is seconds behind, ours is not.
        run_config=RunConfig(
            name=f"{job.metadata.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run.ray.absolute()),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        torch_config=TorchConfig(backend="nccl" if asked.gpu else "gloo"),
    )
    # Not in the main thread: there Ray would take our signals for its own.
    with ThreadPoolExecutor(1) as threads:
        outcome: Outcome = threads.submit(trainer.fit).result().return_value
        return outcome


def _on_worker(given: dict[str, Any]) -> Outcome:
    """In a process of Ray's."""
    from ray.train import get_context
    from ray.train.torch import get_device

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if Path(given["directory"]).is_dir():  # as the driver's: a job names files from there
        os.chdir(given["directory"])
    context = get_context()
    workers = Workers(
        context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device=str(get_device())
    )
    run: RunDirectory = given["run"]
    return work(given["job"], run, given["rows"], workers, run.stop.exists)


def connect(job: FineTuningJob) -> None:
    """To the cluster at RAY_ADDRESS, else to one of this machine that ends with this process."""
    import ray

    def quieten() -> None:
        """Where Ray has no dashboard, one of its processes asks for it every second, and says so. In here, so that
        Ray's processes need not import this module, and torch with it.
        """
        logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _WAITS_FOR_NODES_S)
    address, asked = os.environ.get("RAY_ADDRESS"), job.spec.resources
    cpus = max(os.cpu_count() or 1, job.spec.distributed.workers * asked.cpu)
    here: dict[str, Any] = {"address": address}
    if not address:
        here = {"address": "local", "num_cpus": cpus, "runtime_env": {"worker_process_setup_hook": quieten}}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(**here, include_dashboard=None if address else False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address or "this machine", _last_line(error)) from error
    for number, handler in handlers.items():  # Ray puts its own, which end this process before anything is saved
        signal.signal(number, handler)
    check_resources(job, {"GPU": 0, **ray.cluster_resources()}, alone=not address)


def check_resources(job: FineTuningJob, there: Mapping[str, float], *, alone: bool) -> None:
    """there: of Ray's names, GPU and CPU, how many; one that is missing is not looked at when alone, else 0. In a
    cluster more nodes may be on their way: then it is only said, once. Raises ResourceError.
    """
    for kind, each in (("GPU", job.spec.resources.gpu), ("CPU", job.spec.resources.cpu)):
        wanted = job.spec.distributed.workers * each
        if wanted <= there.get(kind, wanted if alone else 0):
            continue
        if not alone:
            said = "the cluster has %.0f %ss, %d are asked for: waiting for the rest"
            _log.warning(said, there.get(kind, 0), kind, wanted)
            continue
        raise ResourceError(
            f"spec.resources.{kind.lower()}: {wanted} {kind}s are asked for, this machine has {there[kind]:.0f}",
            field=f"spec.resources.{kind.lower()}",
            value=wanted,
            remedy="lower it or distributed.workers, or set RAY_ADDRESS to a cluster that has them",
        )


def _told_by_workers(failed: Exception) -> TrainerError | None:
    """What a person did, or a machine lacks, if a worker said so: to try again is no use."""
    for error in getattr(failed, "worker_failures", {}).values():
        told = getattr(error, "_base_exc", error)  # Ray's wrapper of a worker's own exception
        if isinstance(told, TrainerError):
            return told
    return None


def _given_up(job: FineTuningJob, lost: int, failed: Exception) -> ResourceError:
    return ResourceError(
        f"spec.distributed.maxFailures: workers were lost {lost} times, of which "
        f"{job.spec.distributed.max_failures} are survived; the last: {_last_line(failed)}",
        field="spec.distributed.maxFailures",
        value=job.spec.distributed.max_failures,
        remedy="look for the reason above and in Ray's log (/tmp/ray/session_latest/logs), raise maxFailures where it "
        "was the machines', then resume the run: its checkpoints are as they were",
    )


def _last_line(problem: Exception) -> str:
    """The last line of what Ray says: the exception itself, below its traceback."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(problem).__name__
