"""As manifests/operator installs it, on a real API server: its own account and role, its own webhook configurations,
tokens that the server itself reviews. The double has none of these: there is nothing to collect without a real server.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml

from aim_operator.finetuning.objects import AUDIENCE, JOB_LABEL
from crd_schemas import CRDS, FOLDERS
from gpu_nodes import GpuNodes
from kube_double.cluster import Cluster, KubectlFailed, cluster
from manifest_files import MANIFESTS, Object, built, of_kind
from operator_process import Operator, operator
from partition_plans import plan_object

pytestmark = pytest.mark.cluster

SYSTEM = "aim-system"
SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/default/inferenceservices"
PLANS = "/apis/aim.amd.com/v1alpha1/partitionplans"
JOBS = "/apis/aim.amd.com/v1alpha1/namespaces/default/finetuningjobs"
POLICIES = "/apis/aim.amd.com/v1alpha1/namespaces/default/guardrailpolicies"
RAY_JOBS = "/apis/ray.io/v1/namespaces/default/rayjobs"
WEBHOOKS = ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration")
THEIRS = ("serving.kserve.io_inferenceservices", "serving.kserve.io_servingruntimes")
THEIRS += ("serving.kserve.io_clusterservingruntimes", "ray.io_rayjobs")
#: A busy machine's operators keep their lease.
PATIENT = ("--lease-duration", "10", "--renew-deadline", "9", "--retry-period", "0.5")
#: In turn; a node that is read back or waited for is a node that an operator may die at.
PHASES = ("Tainting", "WaitingOperator", "Verifying", "WaitingAllocatable")


def apply(kubernetes: Cluster, *objects: Object) -> None:
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
    kubernetes.kubectl("apply", "--server-side", "-f", "-", stdin=listed)


def account(kubernetes: Cluster, folder: Path) -> Path:
    """A kubeconfig with a token of the operator's account."""
    found = yaml.safe_load(kubernetes.kubeconfig.read_text(encoding="utf-8"))
    token = kubernetes.kubectl("create", "token", "aim-operator", "-n", SYSTEM).strip()
    found["users"][0]["user"] = {"token": token}
    file = folder / "account"
    file.write_text(yaml.safe_dump(found), encoding="utf-8")
    return file


def reached_at(configuration: Object, running: Operator) -> Object:
    """Its webhooks where this one listens, in the place of the Service's name."""
    authority = base64.b64encode(running.authority.read_bytes()).decode()
    for hook in configuration["webhooks"]:
        path = hook["clientConfig"]["service"]["path"]
        hook["clientConfig"] = {"url": f"https://127.0.0.1:{running.webhook_port}{path}", "caBundle": authority}
    return configuration


def service(name: str, **annotations: str) -> Object:
    model = {"modelFormat": {"name": "huggingface"}, "runtime": "aim-vllm-cpx-nps4", "storageUri": "hf://Qwen/Qwen3-8B"}
    told = {f"aim.amd.com/{key.replace('_', '-')}": value for key, value in annotations.items()}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "namespace": "default", "annotations": told},
        "spec": {"predictor": {"model": model}},
    }


def job() -> Object:
    spec = {
        "baseModel": {"modelId": "Qwen/Qwen3-8B"},
        "dataset": {"source": "s3://data/chats.jsonl"},
        "output": {"registry": "s3://models/bot"},
        "resources": {"gpu": 1, "volumeClaim": "runs"},
    }
    metadata = {"name": "bot", "namespace": "default"}
    return {"apiVersion": "aim.amd.com/v1alpha1", "kind": "FineTuningJob", "metadata": metadata, "spec": spec}


def tells(kubernetes: Cluster, running: Operator, pod: str, audience: str = AUDIENCE) -> tuple[int, str]:
    """What the operator answers to a pod that shows a token which the server made for it."""
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod}"] if pod else []
    token = kubernetes.kubectl("create", "token", "default", f"--audience={audience}", *bound).strip()
    url = f"{running.reports}/namespaces/default/finetuningjobs/bot/status"
    body = {"trainerStatus": {"progressPercentage": 30}}
    tls = ssl.create_default_context(cafile=running.authority)
    answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {token}"}, verify=tls)
    return answer.status_code, answer.text


def phases(plan: Object) -> list[str]:
    return [each["phase"] for each in plan.get("status", {}).get("nodes", [])]


if CRDS and os.environ.get("KUBEBUILDER_ASSETS"):

    @pytest.fixture(scope="module")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("installed")

    @pytest.fixture(scope="module")
    def kubernetes(folder: Path) -> Iterator[Cluster]:
        """With the operator's objects, cert-manager's and the webhooks' aside."""
        with cluster(folder) as found:
            for file in (file for each in FOLDERS for file in each.glob("*.json") if file.stem in THEIRS):
                found.define(json.loads(file.read_text(encoding="utf-8")))
            objects = built(MANIFESTS / "operator")
            for each in objects:
                if each["kind"] == "CustomResourceDefinition":
                    found.define(each)
            apart = {"CustomResourceDefinition", "Certificate", "Issuer", *WEBHOOKS}
            namespace, *others = sorted(
                (each for each in objects if each["kind"] not in apart), key=lambda each: each["kind"] != "Namespace"
            )
            apply(found, namespace)
            apply(found, *others)
            runtimes = of_kind("ClusterServingRuntime")
            apply(found, *(each for each in runtimes if each["metadata"]["name"] == "aim-vllm-cpx-nps4"))
            yield found

    @pytest.fixture(scope="module")
    def nodes(kubernetes: Cluster, folder: Path) -> Iterator[GpuNodes]:
        """n1 serves; n2 is switched."""
        nodes = GpuNodes(kubernetes, folder)
        nodes.add("n1", mode="CPX/NPS4")
        nodes.add("n2")
        kubernetes.patch("/api/v1/nodes/n1", {"metadata": {"labels": {"amd.com/gpu.device-id": "74a1"}}})
        with nodes.alive():
            yield nodes

    @pytest.fixture(scope="module")
    def running(kubernetes: Cluster, nodes: GpuNodes, folder: Path) -> Iterator[Operator]:
        flags = ("--policy-poll", "0.5", *PATIENT)
        with operator(kubernetes, folder, *flags, kubeconfig=account(kubernetes, folder)) as found:
            wait_ready(found)
            for each in built(MANIFESTS / "operator"):
                if each["kind"] in WEBHOOKS:
                    apply(kubernetes, reached_at(each, found))
            yield found

    def wait_ready(found: Operator) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                if found.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                assert found.process.poll() is None, found.log.read_text()
            time.sleep(0.1)
        raise AssertionError(found.log.read_text())

    def test_services_are_completed_guarded_and_refused(kubernetes: Cluster, running: Operator) -> None:
        # A webhook's configuration takes a moment to be every request's.
        until = time.monotonic() + 30
        while True:
            apply(kubernetes, service("chat", guardrail_policy="chat"))
            predictor = kubernetes.read(f"{SERVICES}/chat")["spec"]["predictor"]
            if "containers" in predictor or time.monotonic() > until:
                break
            kubernetes.delete(f"{SERVICES}/chat")
        assert [each["name"] for each in predictor["containers"]] == ["transformer-container"]
        assert predictor["model"]["resources"]["limits"]["amd.com/cpx_nps4"] == "1"
        with pytest.raises(KubectlFailed, match=r"denied the request: .*max-model-len\]: 'lots'"):
            apply(kubernetes, service("wrong", max_model_len="lots"))

    @pytest.mark.usefixtures("running")
    def test_a_policy_is_kept(kubernetes: Cluster) -> None:
        body = {"apiVersion": "aim.amd.com/v1alpha1", "kind": "GuardrailPolicy", "metadata": {"name": "ours"}}
        apply(kubernetes, body | {"spec": {"prompt": [{"type": "pii", "action": "block"}]}})
        kubernetes.wait_for(POLICIES, "ours", lambda it: it.get("status", {}).get("version"))
        assert kubernetes.exists("/api/v1/namespaces/default/configmaps/ours-guardrail-policy")

    def test_pods_of_a_job_tell_with_tokens_that_the_server_reviews(kubernetes: Cluster, running: Operator) -> None:
        apply(kubernetes, job())
        made = kubernetes.wait_for(RAY_JOBS, "bot", lambda _: True)
        assert made["metadata"]["ownerReferences"][0]["blockOwnerDeletion"] is True
        kubernetes.kubectl("create", "serviceaccount", "default")
        for name, of in (("head", "bot"), ("other", "another")):
            metadata = {"name": name, "labels": {JOB_LABEL: of}}
            spec = {"serviceAccountName": "default", "containers": [{"name": "c", "image": "i"}]}
            kubernetes.create("/api/v1/namespaces/default/pods", {"metadata": metadata, "spec": spec})
        assert tells(kubernetes, running, "head") == (200, "{}")
        assert kubernetes.read(f"{JOBS}/bot")["status"]["trainerStatus"]["progressPercentage"] == 30
        code, said = tells(kubernetes, running, "other")
        assert (code, "pod other is none of job bot" in said) == (403, True)
        code, said = tells(kubernetes, running, "")
        assert (code, "of no pod" in said) == (403, True)
        code, said = tells(kubernetes, running, "head", audience="another")
        assert (code, "not one for aim-operator" in said) == (401, True)

    def test_nothing_was_forbidden(running: Operator) -> None:
        """Of all that it did above."""
        told = running.log.read_text(encoding="utf-8")
        assert "forbidden" not in told.lower()
        assert running.process.poll() is None

    def test_a_node_is_switched_once_by_operators_that_are_killed_in_every_phase(
        kubernetes: Cluster, nodes: GpuNodes, running: Operator, folder: Path
    ) -> None:
        """The last of the file: it ends the operator above. Each successor waits for the lease to run out."""
        nodes.nodes["n2"].silent = True
        apply(kubernetes, plan_object(n2="CPX/NPS4"))
        kubernetes.wait_for(PLANS, "fleet", lambda plan: phases(plan) != [])
        running.kill()
        config = account(kubernetes, folder)
        for number, phase in enumerate(PHASES):
            named = f"next-{number}"
            with operator(kubernetes, folder, *PATIENT, name=named, webhooks=False, kubeconfig=config) as successor:
                kubernetes.wait_for(PLANS, "fleet", partial(passed, phase))
                successor.kill()
                assert "forbidden" not in successor.log.read_text(encoding="utf-8").lower()
            nodes.nodes["n2"].silent = False
        with operator(kubernetes, folder, *PATIENT, name="last", webhooks=False, kubeconfig=config) as last:
            kubernetes.wait_for(PLANS, "fleet", lambda plan: plan["status"].get("phase") == "Succeeded")
            assert "forbidden" not in last.log.read_text(encoding="utf-8").lower()
        assert nodes.nodes["n2"].switches == ["cpx-nps4-x1"]
        assert not nodes.object("n2")["spec"].get("taints")
        header, row = kubernetes.kubectl("get", "partitionplans").splitlines()
        assert header.split()[:4] == ["NAME", "PHASE", "NODES", "CURRENT"]
        assert row.split()[:3] == ["fleet", "Succeeded", "1/1"]

    def passed(phase: str, plan: Object) -> bool:
        """At it, or beyond."""
        order = ["Pending", "Draining", "Tainting", "Applying", "WaitingOperator", "Verifying", "Refreshing"]
        order += ["WaitingAllocatable", "Uncordoning", "Succeeded"]
        return bool(phases(plan)) and order.index(phases(plan)[0]) >= order.index(phase)
