"""What KServe's validating webhooks deny, by the rules of KServe at aaac4e294: pkg/webhook/admission/servingruntime,
pkg/apis/serving/v1beta1/{inference_service_validation,component}.go, pkg/validation. Rules for what we never write
(confidential models, loggers, explainers, other deployment modes' autoscalers) are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

_GPUS = {"nvidia.com/gpu", "amd.com/gpu", "intel.com/gpu", "habana.ai/gaudi"}
_PLAIN = {"cpu", "memory", "storage", "ephemeral-storage"}
_SIZES = {"PIPELINE_PARALLEL_SIZE", "TENSOR_PARALLEL_SIZE"}
_CLASSES = {"hpa", "external", "keda", "none"}


def denied(document: Object, existing: list[Object] | None = None) -> list[str]:
    """A line for each rule that the object breaks. existing: the cluster's serving runtimes."""
    if document["kind"] == "InferenceService":
        return [*_service(document)]
    if document["kind"] == "ClusterServingRuntime":
        return [*_runtime(document, existing or [])]
    return []


def by_itself(runtime: Object) -> list[tuple[str, str | None, int | None]]:
    """Formats for which KServe may choose it: name as KServe compares it, version, priority."""
    formats = runtime["spec"]["supportedModelFormats"]
    return [
        (each["name"].lower(), each.get("version"), each.get("priority")) for each in formats if each.get("autoSelect")
    ]


def _runtime(runtime: Object, existing: list[Object]) -> Iterator[str]:
    spec, name = runtime["spec"], runtime["metadata"]["name"]
    priorities: dict[str, int | None] = {}
    for format_name, _, priority in by_itself(runtime):
        if priorities.setdefault(format_name, priority) != priority:
            yield f"different priorities assigned for the model format {format_name}"
    for other in existing:
        if other["metadata"]["name"] == name:
            if "workerSpec" in other["spec"] and "workerSpec" not in spec:
                yield "removing workerSpec where it already exists is not allowed"
        elif set(spec["protocolVersions"]) & set(other["spec"]["protocolVersions"]):
            for format_name, _, rank in set(by_itself(runtime)) & set(by_itself(other)):
                if rank is not None:
                    yield f"same priority assigned for the model format {format_name}"
    yield from _blocked(spec["containers"])
    if "workerSpec" in spec:
        yield from _workers(spec["workerSpec"], spec["containers"], spec.get("annotations", {}))


def _blocked(containers: list[Object]) -> Iterator[str]:
    for container in containers:
        if "PYTHONPATH" in _variables(container):
            yield f"setting PYTHONPATH in container {container.get('name')} is not allowed for security reasons"


def _variables(container: Object) -> set[str]:
    return {each["name"] for each in container.get("env", [])}


def _workers(worker_spec: Object, heads: list[Object], annotations: dict[str, str]) -> Iterator[str]:
    """heads: the containers that the workers belong to."""
    workers = worker_spec.get("containers", [])
    if len(workers) > 1:
        yield "setting multiple containers in workerSpec is not allowed"
    for container in heads:
        for name in sorted(_variables(container) & _SIZES):
            yield f"setting {name} in environment variables is not allowed"
    known = _GPUS | _PLAIN | set(json.loads(annotations.get("serving.kserve.io/gpu-resource-types", "[]")))
    for container in (*heads, *workers):
        resources = container.get("resources", {})
        if {*resources.get("limits", {}), *resources.get("requests", {})} - known:
            yield f"unknown GPU resource type in a container({container.get('name')})"
    for size in ("pipelineParallelSize", "tensorParallelSize"):
        if worker_spec.get(size, 1) < 1:
            yield f"the WorkerSpec.{size} cannot be less than 1({worker_spec[size]})"


def _service(service: Object) -> Iterator[str]:
    name, annotations = service["metadata"]["name"], service["metadata"].get("annotations", {})
    predictor = service["spec"]["predictor"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the InferenceService {name} is invalid: a DNS-1035 label is needed"
    autoscaler = annotations.get("serving.kserve.io/autoscalerClass")
    if autoscaler is not None and autoscaler not in _CLASSES:
        yield f"[{autoscaler}] is not a supported autoscaler class type"
    for container in predictor.get("containers", []):
        if container["name"] == "transformer-container" and "STORAGE_URI" in _variables(container):
            yield "storage uri should not be specified in transformer container"
    yield from _model(predictor)
    if "workerSpec" in predictor:
        yield from _multi_node(predictor, annotations)
    for component in service["spec"].values():
        yield from _component(component, annotations, autoscaler)


def _model(predictor: Object) -> Iterator[str]:
    model = predictor.get("model", {})
    if model.get("name"):
        yield "the 'name' field is not allowed in standard predictor"
    if "storageUri" in model and "storageUris" in predictor:
        yield "Setting both StorageURI and StorageURIs is not supported."
    yield from _blocked([model])


def _multi_node(predictor: Object, annotations: dict[str, str]) -> Iterator[str]:
    model = predictor.get("model")
    yield from _workers(predictor["workerSpec"], [model] if model else [], annotations)
    if model is None:
        return
    protocol = model.get("storageUri", "").split("://")[0]
    if protocol not in ("pvc", "oci"):
        yield f"multi-node: the storage protocol {protocol!r} is not supported: pvc or oci"
    if annotations.get("serving.kserve.io/autoscalerClass") != "none":
        yield "multi-node: the autoscaler class has to be none"


def _component(component: Object, annotations: dict[str, str], autoscaler: str | None) -> Iterator[str]:
    custom = [each for each in component.get("containers", []) if each["name"] == "kserve-container"]
    if ("model" in component) + len(custom) > 1 or not ("model" in component or component.get("containers")):
        yield "exactly one implementation of a component is needed"
    least, most = component.get("minReplicas", 1), component.get("maxReplicas", 0)
    if least < 0 or most < 0:
        yield "replicas cannot be less than 0"
    if least > most != 0:
        yield "MinReplicas cannot be greater than MaxReplicas"
    yield from _blocked(component.get("containers", []))
    # RawDeployment is the name of 0.15; since 0.16 the webhook knows Standard alone, and takes the rest for Knative.
    if annotations.get("serving.kserve.io/deploymentMode") != "Standard":
        if "deploymentStrategy" in component:
            yield "customizing deploymentStrategy is only supported for raw deployment mode"
    elif autoscaler == "keda":
        yield from _keda(component)


def _keda(component: Object) -> Iterator[str]:
    if "scaleMetric" in component:
        yield "ScaleMetric is not supported for KEDA"
    for metric in component.get("autoScaling", {}).get("metrics", []):
        source = {"External": "external", "PodMetric": "podmetric", "Resource": "resource"}.get(metric["type"])
        if source is None:
            yield f"unknown KEDA metric type with value [{metric['type']}]"
        elif source not in metric:
            yield f"metricSpec.{metric['type']} is not set"
        elif source != "resource":
            yield from _queried(metric[source])


def _queried(source: Object) -> Iterator[str]:
    if not source["metric"].get("query"):
        yield "the query should not be empty"
    target = source["target"]
    if "value" not in target:
        yield "the target threshold value should not be empty"
    if target.get("type") == "AverageValue" and "averageValue" not in target:
        yield "the AverageValue type should be set"
