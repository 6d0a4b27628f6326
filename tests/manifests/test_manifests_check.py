"""`make manifests-check`: every object is one that a real cluster takes, and what it would not take is seen."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from crd_schemas import CRDS, violations
from kserve_webhook import denied
from manifest_files import Object, everything, name_of, of_kind, others

RUNTIMES = {name_of(document): document for document in of_kind("ClusterServingRuntime")}
SERVICES = {name_of(document): document for document in of_kind("InferenceService")}

#: What KServe installs of its own for our formats.
KSERVES: Object = {
    "metadata": {"name": "kserve-huggingfaceserver"},
    "spec": {
        "supportedModelFormats": [{"name": "huggingface", "version": "1", "autoSelect": True, "priority": 1}],
        "protocolVersions": ["v2", "v1"],
        "containers": [{"name": "kserve-container"}],
    },
}


def test_a_cluster_gets_as_many_objects_as_this() -> None:
    assert Counter(document["kind"] for document in everything()) == {
        "Certificate": 2,
        "ClusterServingRuntime": 53,
        "ConfigMap": 2,
        "Deployment": 1,
        "DeviceConfig": 2,
        "ExternalSecret": 1,
        "HTTPRoute": 3,
        "InferencePool": 1,
        "InferenceService": 12,
        "Issuer": 2,
        "LimitRange": 1,
        "LocalQueue": 1,
        "Namespace": 1,
        "NetworkPolicy": 9,
        "PodDisruptionBudget": 3,
        "ResourceClaimTemplate": 121,
        "ResourceQuota": 1,
        "Role": 1,
        "RoleBinding": 1,
        "SecretStore": 1,
        "Service": 1,
        "ServiceAccount": 1,
    }


# Where there are no schemas there is nothing to collect: a skip would say that a part of the system is missing.
if CRDS:

    def test_the_real_schemas_take_every_object() -> None:
        assert [f"{name_of(each)}: {line}" for each in [*everything(), *others()] for line in violations(each)] == [
            # The External Secrets Operator's definitions are not among those at hand.
            "aim-keys: no schema at hand: external-secrets.io/v1 ExternalSecret",
            "vault: no schema at hand: external-secrets.io/v1 SecretStore",
        ]


def test_kserves_webhooks_take_every_object_whoever_is_there() -> None:
    there = [KSERVES, *RUNTIMES.values()]
    assert [f"{name_of(each)}: {line}" for each in everything() for line in denied(each, there)] == []


# --- what would not be taken is seen ------------------------------------------------------------------------------


def planted(document: Object, path: str, value: Any) -> Object:
    """The object with `value` at `spec.containers.0.name`; None: without what stands there."""
    found = copy.deepcopy(document)
    *above, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    place: Any = found
    for part in above:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return found


QUEUE: Object = {
    "apiVersion": "kueue.x-k8s.io/v1beta1",
    "kind": "ResourceFlavor",
    "metadata": {"name": "mi300x"},
    "spec": {"nodeTaints": [{"key": "gpu", "value": "amd", "effect": "NoSchedule"}]},
}
ROUTE: Object = {
    "apiVersion": "gateway.networking.k8s.io/v1",
    "kind": "HTTPRoute",
    "metadata": {"name": "chat"},
    "spec": {"rules": [{"backendRefs": [{"name": "chat-predictor", "port": 80}]}]},
}

if CRDS:

    @pytest.mark.parametrize(
        ("document", "path", "value", "says"),
        [
            (RUNTIMES["aim-vllm"], "spec.containers.0.name", None, "'name' is a required property"),
            (RUNTIMES["aim-vllm"], "spec.supportedModelFormats.1.priority", 0, "0 is less than the minimum of 1"),
            (RUNTIMES["aim-vllm"], "spec.containers.0.ports.0.containerPort", "http", "'http' is not of type"),
            (SERVICES["qwen3-8b"], "spec.predictor.model.runtimee", "x", "'runtimee' was unexpected"),
            (SERVICES["qwen3-8b"], "spec.predictor.model.resources.limits.memory", "8 GB", "'8 GB' does not match"),
            (of_kind("NetworkPolicy")[0], "spec.podSelectors", {}, "'podSelectors' was unexpected"),
            (of_kind("NetworkPolicy")[0], "spec.ingress.0.ports.0.protocol", 6, "6 is not of type 'string'"),
            (QUEUE, "spec.nodeTaints.0.effect", "Never", "supported taint effect values"),
            (QUEUE, "spec.nodeTaints.0.effect", None, "'effect' is a required property"),
            (QUEUE, "spec.tolerations", [{"key": "a", "operator": "Exists", "value": "b"}], "value must be empty"),
            (ROUTE, "spec.rules.0.filters", [{"type": "URLRewrite"}], "filter.urlRewrite must be specified"),
            (ROUTE, "spec.rules.0.matches", [{"path": {"value": "no-slash"}}], "an absolute path and start with"),
            (QUEUE, "apiVersion", "kueue.x-k8s.io/v9", "no schema at hand"),
        ],
    )
    def test_a_planted_fault_is_seen(document: Object, path: str, value: Any, says: str) -> None:
        assert violations(document) == []
        assert says in " | ".join(violations(planted(document, path, value)))


def keda(service: Object) -> Object:
    """The service with KEDA's autoscaler, its one metric without a threshold."""
    metric = {"backend": "prometheus", "query": "vllm:num_requests_waiting"}
    scaling = {"metrics": [{"type": "External", "external": {"metric": metric, "target": {"type": "Value"}}}]}
    return planted(annotated(service, autoscalerClass="keda"), "spec.predictor.autoScaling", scaling)


def two_nodes(service: Object, storage: str = "pvc://models/big", autoscaler: str = "none") -> Object:
    """The service on two nodes of whole cards."""
    workers = {"pipelineParallelSize": 2, "containers": []}
    found = planted(annotated(service, autoscalerClass=autoscaler), "spec.predictor.workerSpec", workers)
    found["spec"]["predictor"]["model"] |= {"storageUri": storage, "resources": {"limits": {"amd.com/gpu": "8"}}}
    return found


SERVICE = SERVICES["qwen3-8b"]


def annotated(service: Object, **annotations: str) -> Object:
    found = copy.deepcopy(service)
    found["metadata"]["annotations"] |= {f"serving.kserve.io/{key}": value for key, value in annotations.items()}
    return found


@pytest.mark.parametrize(
    ("faulty", "says"),
    [
        (lambda: annotated(SERVICE, deploymentMode="RawDeployment"), "deploymentStrategy is only supported"),
        (lambda: annotated(SERVICE, autoscalerClass="kpa"), "[kpa] is not a supported autoscaler class"),
        (lambda: planted(SERVICE, "metadata.name", "8b"), "a DNS-1035 label is needed"),
        (lambda: planted(SERVICE, "spec.predictor.model.name", "m"), "'name' field is not allowed"),
        (lambda: planted(SERVICE, "spec.predictor.model.env", [{"name": "PYTHONPATH"}]), "PYTHONPATH"),
        (lambda: planted(SERVICE, "spec.predictor.storageUris", []), "Setting both"),
        (lambda: planted(SERVICE, "spec.predictor.minReplicas", 9), "MinReplicas cannot be greater"),
        (lambda: planted(SERVICE, "spec.predictor.minReplicas", -1), "replicas cannot be less than 0"),
        (
            lambda: planted(SERVICE, "spec.predictor.containers", [{"name": "kserve-container"}]),
            "exactly one implementation",
        ),
        (lambda: keda(SERVICE), "threshold value should not be empty"),
        (lambda: planted(keda(SERVICE), "spec.predictor.scaleMetric", "rps"), "ScaleMetric is not supported"),
        (lambda: planted(keda(SERVICE), "spec.predictor.autoScaling.metrics.0.type", "Pods"), "unknown KEDA metric"),
        (lambda: two_nodes(SERVICE, storage="hf://a/b"), "'hf' is not supported"),
        (lambda: two_nodes(SERVICE, autoscaler="hpa"), "autoscaler class has to be none"),
        (lambda: planted(two_nodes(SERVICE), "spec.predictor.workerSpec.tensorParallelSize", 0), "less than 1(0)"),
        (
            lambda: planted(two_nodes(SERVICE), "spec.predictor.model.env", [{"name": "TENSOR_PARALLEL_SIZE"}]),
            "setting TENSOR_PARALLEL_SIZE",
        ),
        (
            lambda: planted(two_nodes(SERVICE), "spec.predictor.model.resources", {"limits": {"amd.com/cpx_nps4": 1}}),
            "unknown GPU resource type",
        ),
        (
            lambda: planted(two_nodes(SERVICE), "spec.predictor.workerSpec.containers", [{"name": "a"}, {"name": "b"}]),
            "multiple containers in workerSpec",
        ),
    ],
)
def test_a_service_that_kserves_webhook_denies_is_seen(faulty: Callable[[], Object], says: str) -> None:
    assert says in " | ".join(denied(faulty()))


def test_what_the_faults_were_planted_in_is_taken() -> None:
    assert denied(two_nodes(SERVICE)) == []
    threshold = {"type": "Value", "value": "4"}
    whole = planted(keda(SERVICE), "spec.predictor.autoScaling.metrics.0.external.target", threshold)
    assert denied(whole) == []


STOLEN = {"name": "HuggingFace", "version": "1", "autoSelect": True, "priority": 1}


def runtime(**spec: Any) -> Object:
    return {**RUNTIMES["aim-vllm"], "spec": {**RUNTIMES["aim-vllm"]["spec"], **spec}}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"supportedModelFormats": [STOLEN]}, "same priority assigned for the model format huggingface"),
        ({"supportedModelFormats": [STOLEN, {**STOLEN, "version": "2", "priority": 2}]}, "different priorities"),
        ({"containers": [{"name": "c", "env": [{"name": "PYTHONPATH"}]}]}, "setting PYTHONPATH in container c"),
        ({"workerSpec": {"containers": [{"name": "w"}] * 2}}, "multiple containers"),
    ],
)
def test_a_runtime_that_kserves_webhook_denies_is_seen(spec: Object, says: str) -> None:
    assert says in " | ".join(denied(runtime(**spec), [KSERVES]))


def test_a_runtime_of_other_protocols_is_no_rival_and_workers_stay() -> None:
    assert denied(runtime(supportedModelFormats=[STOLEN], protocolVersions=["grpc-v2"]), [KSERVES]) == []
    before = runtime(workerSpec={"containers": [{"name": "w"}]})
    assert denied(runtime(), [before]) == ["removing workerSpec where it already exists is not allowed"]
