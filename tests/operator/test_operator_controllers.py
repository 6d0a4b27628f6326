"""PartitionPlans and FineTuningJobs under the real operator, by the real kubectl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aim_operator.partitions.crd import custom_resource_definition as partition_plans
from aim_profile.files.read import check
from aim_profile.kubernetes.plan_objects import partition_plan_of
from aim_profile.kubernetes.target import Target
from aim_profile.plans.fleet import load_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Plan, PlanError
from aim_profile.plans.workload import load_workloads
from aim_trainer.job.schema import custom_resource_definition as fine_tuning_jobs
from gpu_nodes import GpuNode, GpuNodes
from kube_double.cluster import Cluster, KubectlFailed, cluster
from operator_process import operator
from partition_plans import placement, plan_object

pytestmark = pytest.mark.cluster
PLANS = "/apis/aim.amd.com/v1alpha1/partitionplans"
JOBS = "/apis/aim.amd.com/v1alpha1/namespaces/default/finetuningjobs"
RAY_JOBS = "/apis/ray.io/v1/namespaces/default/rayjobs"
EVENTS = "/api/v1/namespaces/default/events"
RUNS = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
TOLD = {
    "progressPercentage": 30,
    "estimatedRemainingSeconds": 400,
    "metrics": [{"name": "currentStep", "value": "12"}, {"name": "loss", "value": "1.25"}],
}
JOB = {
    "apiVersion": "aim.amd.com/v1alpha1",
    "kind": "FineTuningJob",
    "metadata": {"name": "bot"},
    "spec": {
        "baseModel": {"modelId": "Qwen/Qwen3-8B"},
        "dataset": {"source": "s3://data/chats.jsonl"},
        "output": {"registry": "s3://models/bot"},
        "resources": {"gpu": 1, "volumeClaim": "runs"},
    },
}


def ray_jobs() -> dict[str, Any]:
    """KubeRay's definition, as far as it matters who writes what."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "rayjobs.ray.io"},
        "spec": {
            "group": "ray.io",
            "scope": "Namespaced",
            "names": {"plural": "rayjobs", "singular": "rayjob", "kind": "RayJob"},
            "versions": [{**version, "schema": {"openAPIV3Schema": schema}}],
        },
    }


@pytest.fixture
def kubernetes(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as found:
        for definition in (partition_plans(), fine_tuning_jobs(), ray_jobs()):
            found.define(definition)
        yield found


def apply(kubernetes: Cluster, body: dict[str, Any]) -> None:
    kubernetes.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(body))


def in_phase(phase: str) -> Any:
    return lambda plan: phase in [each["phase"] for each in plan.get("status", {}).get("nodes", [])]


def state(name: str) -> Any:
    return lambda found: found.get("status", {}).get("conditions", [{}])[-1].get("type") == name


def test_a_plan_and_a_job_go_on_where_a_killed_operator_left_them(kubernetes: Cluster, tmp_path: Path) -> None:
    nodes = GpuNodes(kubernetes, tmp_path)
    node = nodes.add("n0", silent=True)
    apply(kubernetes, plan_object(n0="CPX/NPS4"))
    apply(kubernetes, JOB)
    with nodes.alive():
        with (
            kubernetes.contended("/api/v1/nodes/n0", f"{PLANS}/fleet"),
            operator(kubernetes, tmp_path, webhooks=False) as first,
        ):
            kubernetes.wait_for(PLANS, "fleet", in_phase("WaitingOperator"))
            kubernetes.wait_for(RAY_JOBS, "bot", lambda found: True)
            kubernetes.patch(f"{RAY_JOBS}/bot/status", {"status": RUNS})
            kubernetes.wait_for(JOBS, "bot", state("Running"))
            first.kill()
        node.silent = False
        kubernetes.patch(f"{JOBS}/bot/status", {"status": {"trainerStatus": TOLD}})
        kubernetes.patch(f"{RAY_JOBS}/bot/status", {"status": {"jobDeploymentStatus": "Retrying", "failed": 1}})
        # Long enough for a real server to be started anew in the middle of it.
        patient = () if kubernetes.collects else ("--lease-duration", "30", "--renew-deadline", "29")
        with operator(kubernetes, tmp_path, *patient, name="second", webhooks=False):
            goes_on(kubernetes, nodes, node)
            is_told_of_paused_and_deleted(kubernetes)
            is_edited_and_deleted(kubernetes)
    assert not nodes.object("n0")["spec"].get("taints")


def goes_on(kubernetes: Cluster, nodes: GpuNodes, node: GpuNode) -> None:
    kubernetes.wait_for(PLANS, "fleet", lambda plan: plan["status"]["phase"] == "Succeeded")
    assert node.switches == ["cpx-nps4-x1"]
    assert not nodes.object("n0")["spec"].get("unschedulable")
    header, row = kubernetes.kubectl("get", "partitionplans").splitlines()
    assert header.split()[:4] == ["NAME", "PHASE", "NODES", "CURRENT"]
    assert row.split()[:3] == ["fleet", "Succeeded", "1/1"]
    reasons = [each["reason"] for each in kubernetes.items(EVENTS)]
    assert reasons.count("NodeApplying") == 1
    assert reasons.count("NodeSucceeded") == 1


def is_told_of_paused_and_deleted(kubernetes: Cluster) -> None:
    kubernetes.wait_for(JOBS, "bot", lambda found: found["status"]["conditions"][-1]["reason"] == "Retrying")
    row = kubernetes.kubectl("get", "finetuningjobs").splitlines()[1].split()
    assert row[row.index("Running") :][:5] == ["Running", "30", "12", "1.25", "400"], "state, %, step, loss, seconds"
    kubernetes.kubectl("patch", "finetuningjob", "bot", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    kubernetes.wait_for(RAY_JOBS, "bot", lambda found: found["spec"]["suspend"] is True)
    kubernetes.kubectl("delete", "finetuningjob", "bot")
    assert not kubernetes.collects or not kubernetes.exists(f"{RAY_JOBS}/bot"), "it goes with its job"


def is_edited_and_deleted(kubernetes: Cluster) -> None:
    """After a 410; deleted in the middle of its second switch."""
    kubernetes.expire_watches()
    apply(kubernetes, plan_object(n0="DPX/NPS2"))
    kubernetes.wait_for(PLANS, "fleet", lambda plan: plan["status"].get("observedGeneration") == 2)
    kubernetes.kubectl("delete", "partitionplan", "fleet", "--wait=false")
    kubernetes.wait_gone(PLANS, "fleet")


def test_definitions_refuse_what_no_controller_could_do(kubernetes: Cluster) -> None:
    wrong = plan_object(n0="CPX/NPS4")
    wrong["spec"]["plan"]["placements"] = [placement() | {"tp": 2}]
    with pytest.raises(KubectlFailed, match="tp devices: partitions of one card"):
        kubernetes.kubectl("apply", "-f", "-", stdin=json.dumps(wrong))
    kubernetes.create(PLANS, plan_object(n0="CPX/NPS4"))
    with pytest.raises(KubectlFailed, match="strategy is the device plugin's"):
        kubernetes.kubectl("patch", "partitionplan", "fleet", "--type=merge", "-p", '{"spec": {"strategy": "single"}}')
    empty = plan_object("none")
    with pytest.raises(KubectlFailed, match="cards"):
        kubernetes.kubectl("apply", "-f", "-", stdin=json.dumps(empty))


def test_a_plan_is_kept_as_it_was_made(kubernetes: Cluster) -> None:
    samples = Path(__file__).parent.parent.parent / "docs/samples"
    plan = make_plan(load_fleet(samples / "fleet.yaml"), load_workloads(samples / "workloads.yaml"))
    ((_, body),) = partition_plan_of(plan, "fleet", Target())
    kept = kubernetes.create(PLANS, body)["spec"]["plan"]
    assert kept == body["spec"]["plan"], "nothing of it is dropped"
    assert check(Plan, kept, "kept", PlanError) == plan
