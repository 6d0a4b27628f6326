"""A job as a KubeRay RayJob, with the ConfigMap that holds it. Retries and queues are KubeRay's and Kueue's.

Every try is a new RayCluster and every pause deletes it: what a run keeps is on a volume that all pods share, and a job
that names files outside of it is refused. Read of KubeRay 1.7 (ray-operator/controllers/ray/utils/validation.go) and of
Ray 2.60.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from aim_profile.files.place import Place, dotted
from aim_profile.files.write import without_empty
from aim_profile.kubernetes.isolation import SUBMITTER
from aim_profile.kubernetes.serving_runtime import RESTRICTED, image_of
from aim_trainer.errors import JobError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import as_yaml

#: Ray demands the same on head and workers; a test holds it to what is installed.
RAY_VERSION = "2.60.0"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
WORKSPACE = PurePosixPath("/workspace")
_JOB_FOLDER = "/etc/aim-trainer"
#: From SIGTERM to SIGKILL: the step that is under way, and its checkpoint.
_GRACE_S = 600

Object = dict[str, Any]

#: Where the worker of rank 0 answers scrapes; the others leave it closed.
_METRICS: Mapping[str, Any] = {
    "env": [{"name": "AIM_TRAINER_METRICS_PORT", "value": "9400"}],
    "ports": [{"name": "metrics", "containerPort": 9400, "protocol": "TCP"}],
}


def render(job: FineTuningJob) -> tuple[Object, Object]:
    """The ConfigMap and the RayJob. Raises JobError naming what cannot be reached in a cluster."""
    for place, why in _cannot_run_in_a_cluster(job):
        where = dotted(("spec", *place))
        raise JobError(f"{where}: {why}", field=where)
    return _config_map(job), _ray_job(job)


def _cannot_run_in_a_cluster(job: FineTuningJob) -> Iterator[tuple[Place, str]]:
    """The run's directory (tokens, checkpoints, result) is one for all pods, and there before and after them."""
    if job.spec.resources.volume_claim is None:
        yield ("resources", "volumeClaim"), f"is needed: every pod has the run's directory, under {WORKSPACE}"
    for place, uri in _named(job):
        if uri is not None and _is_path(uri) and not _in_workspace(uri):
            yield place, f"{uri} is not in the pods; give a path under {WORKSPACE}, or a URI"


def _named(job: FineTuningJob) -> Iterator[tuple[Place, str | None]]:
    """Every place the job reads from or writes to."""
    spec = job.spec
    yield ("baseModel", "modelId"), spec.base_model.model_id
    for at, source in enumerate(spec.dataset.all_sources()):
        yield ("dataset", *(("sources", at, "uri") if spec.dataset.sources else ("source",))), source.uri
    yield ("dataset", "validation", "source"), spec.dataset.validation.source
    yield ("dataset", "chatTemplate"), spec.dataset.chat_template
    yield ("validation", "regressionPrompts"), spec.validation.regression_prompts
    yield ("checkpoints", "uri"), spec.checkpoints.uri
    yield ("output", "registry"), spec.output.registry
    yield ("output", "guardrailPolicy"), spec.output.guardrail_policy


def _is_path(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def _in_workspace(uri: str) -> bool:
    """Paths that are not absolute are read from there, where every process begins; so are ids of models."""
    path = WORKSPACE / (unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri)
    return path.is_relative_to(WORKSPACE) and ".." not in path.parts


def _config_map(job: FineTuningJob) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, {"name": f"{job.metadata.name}-job"}),
        "data": {"job.yaml": as_yaml(_unsuspended(job))},
    }


def _unsuspended(job: FineTuningJob) -> FineTuningJob:
    """In the pods it runs: whether there are pods is what suspend says, and KubeRay or Kueue changes its mind."""
    if not job.spec.suspend:
        return job
    return job.model_copy(update={"spec": job.spec.model_copy(update={"suspend": False})})


def _ray_job(job: FineTuningJob) -> Object:
    spec = job.spec
    queue = spec.resources.queue
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(
            job, {"name": job.metadata.name, "annotations": job.metadata.annotations}, {QUEUE_LABEL: queue}
        ),
        "spec": {
            "entrypoint": f"aim-trainer run {_JOB_FOLDER}/job.yaml",
            # A pod of its own: the container that SidecarMode puts beside the head has no security context and takes
            # none, so that a namespace of Pod Security's restricted standard refuses the head.
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": _submitter(job),
            # A suspended job gives its devices back; KubeRay refuses suspend without it.
            "shutdownAfterJobFinishes": True,
            "backoffLimit": spec.backoff_limit,
            # Kueue flips it from the moment its label is there.
            **({} if queue else {"suspend": spec.suspend}),
            "rayClusterSpec": {
                "rayVersion": RAY_VERSION,
                "headGroupSpec": {
                    # Nothing is trained on the head.
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod(job, "ray-head", _amounts(job, gpus=False)),
                },
                "workerGroupSpecs": [_workers(job)],
            },
        },
    }


def _submitter(job: FineTuningJob) -> Object:
    """Gives Ray the entrypoint, which KubeRay writes as its command, and follows the log. It computes nothing."""
    container = {
        "name": "ray-job-submitter",
        "image": _image(job),
        "resources": {"requests": {"cpu": "500m", "memory": "200Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": dict(RESTRICTED),
    }
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": "aim-trainer", **SUBMITTER}},
        "spec": {"restartPolicy": "Never", **_restricted_pod(), "containers": [container]},
    }


def _image(job: FineTuningJob) -> str:
    return job.spec.resources.image or image_of("aim-trainer")


def _restricted_pod() -> Object:
    return {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    }


def _workers(job: FineTuningJob) -> Object:
    asked, count = job.spec.resources, job.spec.distributed.workers
    # KubeRay tells Ray of resources whose name ends in gpu; a partition's (amd.com/cpx_nps4) it does not know.
    told = asked.gpu and not asked.resource.endswith("gpu")
    return {
        "groupName": "workers",
        "replicas": count,
        "minReplicas": count,
        "maxReplicas": count,
        "rayStartParams": {"num-gpus": str(asked.gpu)} if told else {},
        "template": _pod(job, "ray-worker", _amounts(job, gpus=True)),
    }


def _amounts(job: FineTuningJob, *, gpus: bool) -> dict[str, str | int]:
    asked = job.spec.resources
    devices = {asked.resource: asked.gpu} if gpus and asked.gpu else {}
    return {"cpu": asked.cpu, **({"memory": asked.memory} if asked.memory else {}), **devices}


def _pod(job: FineTuningJob, container: str, amounts: Mapping[str, str | int]) -> Object:
    """One of the job's pods. No *_VISIBLE_DEVICES: the device plugin says what is seen, Ray deals it to workers."""
    asked = job.spec.resources
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": "aim-trainer"}},
        "spec": {
            # A pod that died is a matter of Ray's and of backoffLimit.
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": _GRACE_S,
            **_restricted_pod(),
            "containers": [
                {
                    "name": container,
                    "image": _image(job),
                    "workingDir": str(WORKSPACE),
                    "resources": {"requests": dict(amounts), "limits": dict(amounts)},
                    **(_METRICS if container == "ray-worker" else {}),
                    "securityContext": dict(RESTRICTED),
                    **({"envFrom": [{"secretRef": {"name": asked.secret}}]} if asked.secret else {}),
                    "lifecycle": {"preStop": {"exec": {"command": _before_stop(job, container)}}},
                    "volumeMounts": [
                        {"name": "job", "mountPath": _JOB_FOLDER, "readOnly": True},
                        {"name": "shm", "mountPath": "/dev/shm"},
                        {"name": "workspace", "mountPath": str(WORKSPACE)},
                    ],
                }
            ],
            "volumes": [
                {"name": "job", "configMap": {"name": f"{job.metadata.name}-job"}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": asked.shared_memory}},
                {"name": "workspace", "persistentVolumeClaim": {"claimName": asked.volume_claim}},
            ],
        },
    }


def _before_stop(job: FineTuningJob, container: str) -> list[str]:
    """SIGTERM ends Ray's processes: before it the head has the run end its step and save, and workers stay for that.
    A worker that goes alone, with its node, is a loss that the run survives.
    """
    run = f"{WORKSPACE}/runs/{job.metadata.name}"
    if container == "ray-head":
        return ["aim-trainer", "pause", run, "--patience", str(_GRACE_S - 30)]
    return ["sh", "-c", f"sleep 10; while [ -e {run}/stop ]; do sleep 1; done"]


def _metadata(job: FineTuningJob, own: Object, labels: Mapping[str, str | None] | None = None) -> Object:
    named = {**job.metadata.labels, "app.kubernetes.io/name": "aim-trainer", **(labels or {})}
    made: Object = without_empty({**own, "namespace": job.metadata.namespace, "labels": named})
    return made
