"""A job as a RayJob: what KubeRay, Kueue and the device plugin ask of it."""

from __future__ import annotations

import json
import os
import re
import tomllib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from aim_trainer.cli.app import app
from aim_trainer.errors import JobError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import read_job
from aim_trainer.metrics import sinks
from aim_trainer.render import QUEUE_LABEL, RAY_VERSION, render

ROOT = Path(__file__).parent.parent.parent
# CustomResourceDefinitions as JSON, from KubeRay's repository. They are not ours to ship.
CRD_FOLDERS = [Path(os.environ["KUBERAY_CRDS"])] if "KUBERAY_CRDS" in os.environ else sorted(ROOT.parent.glob("*/crds"))
CRDS = [file for folder in CRD_FOLDERS for file in folder.glob("ray.io_rayjobs.json")]


def job(**spec: Any) -> FineTuningJob:
    base = {
        "baseModel": {"modelId": "org/model"},
        "dataset": {"source": "s3://bucket/chats.jsonl"},
        "output": {"registry": "oci://registry/llm/bot"},
    }
    resources = {"volumeClaim": "shared", **spec.pop("resources", {})}
    return FineTuningJob.model_validate(
        {
            "apiVersion": "aim.amd.com/v1alpha1",
            "kind": "FineTuningJob",
            "metadata": {"name": "bot", "namespace": "llm", "labels": {"team": "a"}},
            "spec": {**base, **spec, "resources": resources},
        }
    )


JOBS = [
    job(),
    job(distributed={"workers": 8}, resources={"gpu": 1, "cpu": 8, "memory": "64Gi", "queue": "team-a"}),
    job(resources={"gpu": 2, "resource": "amd.com/cpx_nps4", "image": "registry/trainer:1", "secret": "keys"}),
    job(suspend=True, backoffLimit=3, checkpoints={"uri": "/workspace/c"}),
]


def pods(ray_job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("asked", JOBS)
def test_what_kuberay_refuses_is_not_in_it(asked: FineTuningJob) -> None:
    _, ray_job = render(asked)
    spec = ray_job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True  # or suspend is refused
    assert "clusterSelector" not in spec  # or suspend and backoffLimit are
    assert spec["submissionMode"] == "K8sJobMode"  # or a template for the submitter is
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"  # or a Job's is
    assert spec["backoffLimit"] == asked.spec.backoff_limit
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", ray_job["metadata"]["name"])
    assert len(ray_job["metadata"]["name"]) <= 47


@pytest.mark.parametrize("asked", JOBS)
def test_the_submitter_is_restricted_and_its_command_is_kuberays(asked: FineTuningJob) -> None:
    _, ray_job = render(asked)
    pod = ray_job["spec"]["submitterPodTemplate"]["spec"]
    (container,) = pod["containers"]
    head = pods(ray_job)[0]
    assert container["securityContext"] == head["containers"][0]["securityContext"]
    assert (pod["securityContext"], pod["automountServiceAccountToken"]) == (head["securityContext"], False)
    assert container["image"] == head["containers"][0]["image"]
    assert not {"command", "args", "envFrom"} & container.keys()  # it computes nothing, and needs no key
    assert {"cpu", "memory"} == container["resources"]["limits"].keys() == container["resources"]["requests"].keys()


@pytest.mark.parametrize("asked", JOBS)
def test_every_pod_is_restricted_and_sees_what_the_device_plugin_gives_it(asked: FineTuningJob) -> None:
    _, ray_job = render(asked)
    for pod in pods(ray_job):
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert not any("hostPath" in volume for volume in pod["volumes"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]
        assert pod["terminationGracePeriodSeconds"] >= 300
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert "VISIBLE_DEVICES" not in json.dumps(ray_job)


def test_prometheus_finds_the_workers_port() -> None:
    head, worker = (pod["containers"][0] for pod in pods(render(JOBS[1])[1]))
    (port,) = worker["ports"]
    assert port["name"] == "metrics"  # as manifests/monitoring/base/trainer.yaml has it
    assert worker["env"] == [{"name": sinks.METRICS_PORT, "value": str(port["containerPort"])}]
    assert "ports" not in head


def test_the_image_is_this_release_s_unless_the_job_names_one() -> None:
    images = [{pod["containers"][0]["image"] for pod in pods(render(asked)[1])} for asked in (JOBS[0], JOBS[2])]
    assert images == [{f"aim-trainer:{version('aim-kserve')}"}, {"registry/trainer:1"}]


def test_workers_ask_for_devices_and_the_head_for_none() -> None:
    _, ray_job = render(JOBS[1])
    head, worker = pods(ray_job)
    assert head["containers"][0]["resources"]["limits"] == {"cpu": 8, "memory": "64Gi"}
    assert worker["containers"][0]["resources"]["limits"] == {"cpu": 8, "memory": "64Gi", "amd.com/gpu": 1}
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"], group["rayStartParams"]) == (8, 8, 8, {})


def test_partitions_are_told_to_ray_which_cannot_know_them() -> None:
    _, ray_job = render(JOBS[2])
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert (group["rayStartParams"], container["resources"]["limits"]["amd.com/cpx_nps4"]) == ({"num-gpus": "2"}, 2)
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]


def test_a_run_saves_before_its_pods_are_gone() -> None:
    _, ray_job = render(JOBS[1])
    head, worker = (pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] for pod in pods(ray_job))
    assert head == ["aim-trainer", "pause", f"/workspace/runs/{JOBS[1].metadata.name}", "--patience", "570"]
    assert "while [ -e /workspace/runs/" in worker[-1]  # stays where the run was asked to stop


def test_suspend_is_kueues_where_it_has_the_job() -> None:
    queued, plain, paused = (render(JOBS[at])[1] for at in (1, 0, 3))
    assert (queued["metadata"]["labels"][QUEUE_LABEL], "suspend" in queued["spec"]) == ("team-a", False)
    assert (QUEUE_LABEL in plain["metadata"]["labels"], plain["spec"]["suspend"]) == (False, False)
    assert (paused["spec"]["suspend"], paused["spec"]["backoffLimit"]) == (True, 3)


def test_the_job_travels_with_it(tmp_path: Path) -> None:
    config_map, ray_job = render(JOBS[3])
    file = tmp_path / "job.yaml"
    file.write_text(config_map["data"]["job.yaml"])
    # Whether there are pods is what suspend says; in them the job runs.
    assert JOBS[3].spec.suspend
    assert read_job(file) == JOBS[3].model_copy(update={"spec": JOBS[3].spec.model_copy(update={"suspend": False})})
    assert ray_job["spec"]["entrypoint"] == "aim-trainer run /etc/aim-trainer/job.yaml"
    assert CliRunner().invoke(app, ["run", "--help"]).exit_code == 0
    for pod in pods(ray_job):
        assert {"name": "job", "configMap": {"name": config_map["metadata"]["name"]}} in pod["volumes"]
    assert config_map["metadata"]["namespace"] == ray_job["metadata"]["namespace"] == "llm"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"resources": {"volumeClaim": None}}, "spec.resources.volumeClaim: is needed: every pod has the run's"),
        ({"checkpoints": {"uri": "/tmp/c"}}, "spec.checkpoints.uri: /tmp/c is not in the pods"),
        ({"output": {"registry": "file:///models"}}, "spec.output.registry: file:///models is not in the pods"),
        ({"dataset": {"source": "../chats.jsonl"}}, "spec.dataset.source: ../chats.jsonl is not in the pods"),
        ({"dataset": {"sources": [{"uri": "/x.csv"}]}}, "spec.dataset.sources[0].uri: /x.csv is not in the pods"),
        ({"baseModel": {"modelId": "/models/llama"}}, "spec.baseModel.modelId: /models/llama is not in the pods"),
        ({"dataset": {"source": "file:///workspace/%2e%2e/x.csv"}}, "spec.dataset.source: file:///workspace/%2e%2e/x"),
        ({"output": {"guardrailPolicy": "/workspace/../p"}}, "spec.output.guardrailPolicy: /workspace/../p is not in"),
    ],
)
def test_what_the_pods_do_not_share_is_refused(spec: dict[str, Any], told: str) -> None:
    with pytest.raises(JobError) as refused:
        render(job(**spec))
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize(
    "source", ["chats.jsonl", "/workspace/chats.jsonl", "file:///workspace/chats.jsonl", "hf://a/b"]
)
def test_paths_are_of_the_volume_that_all_pods_share(source: str) -> None:
    _, ray_job = render(job(dataset={"source": source}))
    for pod in pods(ray_job):
        assert {"name": "workspace", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
        assert pod["containers"][0]["workingDir"] == "/workspace"


def test_ray_is_the_one_that_is_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"ray[train,tune]=={RAY_VERSION}" in extras["trainer"]


def test_the_verb_prints_both_objects(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(render(JOBS[1])[0]["data"]["job.yaml"])
    printed = CliRunner().invoke(app, ["render", str(file)])
    assert list(yaml.safe_load_all(printed.stdout)) == list(render(JOBS[1]))
    refused = CliRunner().invoke(app, ["render", str(file), "--set", "spec.checkpoints.uri=/c"])
    assert (refused.exit_code, "spec.checkpoints.uri: /c is not" in refused.output) == (2, True)


def closed(schema: Any) -> Any:
    """OpenAPI as JSON Schema: objects closed (a server drops what it does not know), int-or-string allowed."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


@cache
def crd() -> jsonschema.Draft202012Validator:
    versions = json.loads(CRDS[0].read_text(encoding="utf-8"))["spec"]["versions"]
    (schema,) = [found["schema"]["openAPIV3Schema"] for found in versions if found["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return jsonschema.Draft202012Validator(closed(schema))


# Where there is no schema there is nothing to collect: an empty parameter set would count as a skip.
if CRDS:

    @pytest.mark.parametrize("asked", JOBS)
    def test_it_is_valid_against_the_real_schema(asked: FineTuningJob) -> None:
        assert [error.message for error in crd().iter_errors(render(asked)[1])] == []

    def test_the_schema_check_can_fail() -> None:
        _, ray_job = render(JOBS[0])
        ray_job["spec"]["entrypoynt"] = "x"
        ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
        assert len(list(crd().iter_errors(ray_job))) == 2
