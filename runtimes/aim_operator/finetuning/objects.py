"""A FineTuningJob as what carries it out: the trainer's own ConfigMap and RayJob, owned by the job, whose pods tell the
operator how far they are.

How they tell is Kubeflow Trainer's (KEP-2779): a URL, an authority's certificate, and a token of the pod's own, which
names the pod and is good for us alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from aim_profile.files.read import check
from aim_trainer.errors import JobError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.render import render

Object = dict[str, Any]
#: On a RayJob: what it was made of, and of which generation of the job. On its pods: whose they are.
DIGEST, GENERATION = "training.aim.amd.com/spec-digest", "training.aim.amd.com/generation"
JOB_LABEL = "training.aim.amd.com/job"
#: Whom the pods' tokens are for.
AUDIENCE = "aim-operator"
CA_FILE = "ca.crt"
_TOKEN_FOLDER = "/var/run/secrets/aim-operator"
_JOB_FOLDER = "/etc/aim-trainer"
_TOKEN_S = 3600
#: Notes of kubectl and kopf on the job, which are none of the RayJob's.
_FOREIGN = ("kubectl.kubernetes.io/", "operator.aim.amd.com/")


class Reports(NamedTuple):
    """Where pods tell: url: of the operator, without a path; authority: the certificate that vouches for it, as PEM."""

    url: str
    authority: str


class Made(NamedTuple):
    """digest: of all but whether it is suspended."""

    config_map: Object
    ray_job: Object
    digest: str


def made_of(raw: Mapping[str, Any], reports: Reports | None) -> Made:
    """Of the object as the API server has it. Raises JobError naming the field."""
    notes = raw["metadata"].get("annotations") or {}
    kept = {key: value for key, value in notes.items() if not key.startswith(_FOREIGN)}
    metadata = {**raw["metadata"], "annotations": kept}
    asked = check(FineTuningJob, {**raw, "metadata": metadata}, raw["metadata"]["name"], JobError).spec.suspend
    # Whether it is suspended is no part of the work: what the pods read is the same before and after.
    spec = {key: value for key, value in raw["spec"].items() if key != "suspend"}
    job = check(FineTuningJob, {**raw, "metadata": metadata, "spec": spec}, raw["metadata"]["name"], JobError)
    config_map, ray_job = (copy.deepcopy(each) for each in render(job))
    if "suspend" in ray_job["spec"]:
        ray_job["spec"]["suspend"] = asked
    owner = {key: raw[key] for key in ("apiVersion", "kind")}
    owner |= {"name": raw["metadata"]["name"], "uid": raw["metadata"]["uid"], "controller": True}
    for each in (config_map, ray_job):
        each["metadata"]["ownerReferences"] = [{**owner, "blockOwnerDeletion": True}]
    for pod in _pods(ray_job):
        pod["metadata"].setdefault("labels", {})[JOB_LABEL] = raw["metadata"]["name"]
        if reports is not None:
            _let_report(pod, reports, raw["metadata"])
    if reports is not None:
        config_map["data"][CA_FILE] = reports.authority
    digest = _digest(config_map, ray_job)
    notes = ray_job["metadata"].setdefault("annotations", {})
    notes |= {DIGEST: digest, GENERATION: str(raw["metadata"].get("generation", 1))}
    return Made(config_map, ray_job, digest)


def _pods(ray_job: Object) -> list[Object]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    return [each["template"] for each in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def _let_report(pod: Object, reports: Reports, metadata: Mapping[str, Any]) -> None:
    path = f"/namespaces/{metadata['namespace']}/finetuningjobs/{metadata['name']}"
    told = {
        "KUBEFLOW_TRAINER_STATUS_URL": f"{reports.url}{path}/status",
        "KUBEFLOW_TRAINER_STATUS_CA_CERT": f"{_JOB_FOLDER}/{CA_FILE}",
        "KUBEFLOW_TRAINER_STATUS_TOKEN": f"{_TOKEN_FOLDER}/token",
        "AIM_TRAINER_PUBLISHED_URL": f"{reports.url}{path}/published",
    }
    token = {"audience": AUDIENCE, "expirationSeconds": _TOKEN_S, "path": "token"}
    volume = {"name": "operator-token", "projected": {"sources": [{"serviceAccountToken": token}]}}
    pod["spec"].setdefault("volumes", []).append(volume)
    for container in pod["spec"]["containers"]:
        container.setdefault("env", []).extend({"name": name, "value": value} for name, value in told.items())
        mount = {"name": "operator-token", "mountPath": _TOKEN_FOLDER, "readOnly": True}
        container.setdefault("volumeMounts", []).append(mount)


def _digest(config_map: Object, ray_job: Object) -> str:
    spec = {key: value for key, value in ray_job["spec"].items() if key != "suspend"}
    # The authority's certificate is renewed; the job is as it was.
    data = {key: value for key, value in config_map["data"].items() if key != CA_FILE}
    text = json.dumps([data, spec], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
