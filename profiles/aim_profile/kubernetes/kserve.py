"""Profiles and plans as KServe and Kubernetes objects: plain dictionaries, written by files.write as a person would.

A pod asks for its devices as a resource of the AMD device plugin (`amd.com/cpx_nps4` under the plugin's mixed naming
strategy, `amd.com/gpu` with a node selector under single), on nodes of the product it was sized for, and gets exactly
those: no host paths, no privileges, no `*_VISIBLE_DEVICES`. Where AMD's DRA driver is in the plugin's place it claims
them (claims.py). What the runtime must know stands in `aim.amd.com/`
annotations, which it reads through the Downward API, and in its flags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from aim_profile.files.write import dump, without_empty
from aim_profile.gpus.catalog import Accelerator, PartitionMode, by_name, catalog
from aim_profile.plans.dcm import PARTITION_LABEL
from aim_profile.serving.engine_args import environment
from aim_profile.serving.profile import Profile

from .claims import AUTO_PARTITION, claim_template, pod_claims
from .devices import one_of, product_of, resource_name, resources_of
from .isolation import ENTRY
from .serving_runtime import ModelFormat, environment_variables, serving_runtime
from .target import RenderError, Target

Document = tuple[str, dict[str, Any]]

PREFIX = "aim.amd.com/"
_HOSTNAME = "kubernetes.io/hostname"
# The runtime's own settings; the others of vLLM's arguments travel as --engine_args.
_OWN_SETTINGS = ("max-model-len", "max-num-seqs", "tensor-parallel-size")
# What manifests/ calls the runtimes that ask for one partition of a kind.
_VARIANT = re.compile(r"aim-vllm-([cdqst]px)-(nps[124])(-dra)?")
_ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.gguf)")


class Service(NamedTuple):
    """One InferenceService: a profile, served `replicas` times. nodes: where the plan put them, empty: anywhere.

    storage_uri: None: `hf://` and the profile's model_id. spread: no two replicas on one node.
    """

    name: str
    profile: Profile
    replicas: int = 1
    nodes: tuple[str, ...] = ()
    spread: bool = False
    storage_uri: str | None = None


def render_services(services: Sequence[Service], target: Target | None = None) -> list[Document]:
    """A ClusterServingRuntime for each gfx target, unless the target has one; an InferenceService for each service, and
    where its devices are claimed the ResourceClaimTemplate."""
    target = target or Target()
    devices = [_device(service.profile)[0] for service in services if target.runtime is None]
    runtimes = {_runtime_name(accelerator): accelerator for accelerator in devices}
    documents = [(_RUNTIME_COMMENT, runtime(accelerator, target)) for accelerator in runtimes.values()]
    for service in services:
        if target.allocation == "dra":
            documents.append(_claim(service, target))
        documents.append((_comment(service, target), inference_service(service, target)))
    return documents


def runtime(accelerator: Accelerator, target: Target) -> dict[str, Any]:
    """The ClusterServingRuntime for every partition of GPUs of one gfx target."""
    # What depends on the partition or on tensor parallelism is the service's own.
    return serving_runtime(
        _runtime_name(accelerator),
        "vllm",
        (ModelFormat("huggingface"),),
        target.image,
        environment(accelerator, accelerator.mode("SPX"), 1),
    )


_RUNTIME_COMMENT = (
    "Serves any model on any partition of these GPUs; what differs stands in the InferenceService.\n"
    "A node whose /dev/kfd is not open to everyone needs its render group in the service's\n"
    "predictor.securityContext.supplementalGroups."
)


def inference_service(service: Service, target: Target) -> dict[str, Any]:
    """The InferenceService of one profile. Raises RenderError for a name Kubernetes refuses, or a foreign engine."""
    _check(service)
    accelerator, mode = _device(service.profile)
    _check_partition(service, mode, accelerator, target)
    devices = max(1, service.profile.metadata.gpu_count)
    own = {} if target.runtime else environment(accelerator, accelerator.mode("SPX"), 1)
    predictor = {
        "minReplicas": service.replicas,
        "maxReplicas": service.replicas,
        # A rolling update's extra pod would wait for a device that the old one holds.
        "deploymentStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "terminationGracePeriodSeconds": 60,
        # Nothing in the pod speaks to the API server.
        "automountServiceAccountToken": False,
        "labels": dict(ENTRY),
        **_where(service, mode, accelerator, target),
        "model": {
            "modelFormat": {"name": "huggingface", "version": "1"},
            "runtime": target.runtime or _runtime_name(accelerator),
            "storageUri": service.storage_uri or f"hf://{service.profile.model_id}",
            "args": flags_of(service.profile),
            "env": environment_variables(
                {key: value for key, value in service.profile.env_vars.items() if own.get(key) != value}
            ),
            "resources": resources_of(_resource(mode, accelerator, target), devices, mode),
        },
    }
    if target.allocation == "dra":
        predictor["resourceClaims"] = pod_claims(_template_name(service))
    metadata = {
        "name": service.name,
        "namespace": target.namespace,
        "annotations": service_annotations(service.profile),
    }
    body = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata,
        "spec": {"predictor": predictor},
    }
    cleaned: dict[str, Any] = without_empty(body)
    return cleaned


def service_annotations(profile: Profile) -> dict[str, str]:
    """What the runtime and the guardrail read through the Downward API; Kubernetes wants text."""
    use, sharing = profile.partition, profile.gpu_sharing
    rules = [rule.model_dump(exclude_none=True) for rule in profile.guardrails]
    found: dict[str, Any] = {
        "profile": profile.id,
        "precision": profile.metadata.precision,
        "metric": profile.metadata.metric,
        "max-model-len": profile.engine_arg("max-model-len"),
        "max-concurrency": profile.engine_arg("max-num-seqs"),
        "gpu-sharing": "enabled" if profile.is_partitioned else "disabled",
        "compute-partition": use.compute if use else None,
        "memory-partition": use.memory if use else None,
        "partition-count": profile.metadata.gpu_count if profile.is_partitioned else None,
        "partition-id": sharing.partition_id,
        "memory-limit": None if sharing.memory_limit_gb is None else f"{sharing.memory_limit_gb:g}GB",
        "qos-priority": sharing.qos_priority,
        "guardrails": dump(rules) if rules else None,
    }
    ours = {PREFIX + key: str(value) for key, value in found.items() if value is not None}
    return {"serving.kserve.io/deploymentMode": "Standard", **ours}


def service_name(text: str) -> str:
    """A model's id or a profile's as the name of an InferenceService: `qwen3-8b`. Raises RenderError."""
    last = text.rstrip("/").rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:52].rstrip("-")
    if not name:
        raise RenderError(f"{text!r} gives no name", field="name", value=text, remedy="name the service with --name")
    return name if name[0].isalpha() else f"m-{name}"


def _check(service: Service) -> None:
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", service.name) or len(service.name) > 53:
        raise RenderError(
            f"name: {service.name!r} is no name of an InferenceService",
            field="name",
            value=service.name,
            remedy="start with a letter; lower case, digits and - only; at most 53 characters",
        )
    if service.profile.metadata.engine != "vllm":
        raise RenderError(
            f"engine: {service.profile.metadata.engine} is not rendered",
            field="metadata.engine",
            value=service.profile.metadata.engine,
            remedy="profiles for vllm are",
        )
    model_id = service.profile.model_id
    if service.storage_uri is None and (model_id is None or not _ON_THE_HUB.fullmatch(model_id)):
        what = "a general profile names no model" if model_id is None else f"{model_id} is a path on this machine"
        raise RenderError(
            f"{service.name}: {what}",
            field="storage-uri",
            value=model_id,
            remedy=f"say where the cluster finds it: --storage-uri {service.name}=pvc://claim/path (or s3://, hf://)",
        )


def _check_partition(service: Service, mode: PartitionMode, accelerator: Accelerator, target: Target) -> None:
    """KServe merges both: a pod of another partition's runtime would ask for a device of each kind."""
    variant = _VARIANT.fullmatch(target.runtime or "")
    if not variant:
        return
    runs, asked = f"amd.com/{variant[1]}_{variant[2]}", resource_name(mode, accelerator, target.strategy)
    if (runs, bool(variant[3])) != (asked, target.allocation == "dra"):
        ways = {True: f"claims {runs}", False: f"asks for {runs}"}
        raise RenderError(
            f"runtime: {target.runtime} {ways[bool(variant[3])]}, and {service.name} is for {asked}"
            + (" by claim" if target.allocation == "dra" else ""),
            field="runtime",
            value=target.runtime,
            remedy="name aim-vllm, which asks for nothing of its own",
        )


def _claim(service: Service, target: Target) -> Document:
    accelerator, mode = _device(service.profile)
    devices = max(1, service.profile.metadata.gpu_count)
    template = claim_template(
        _template_name(service),
        mode,
        accelerator,
        devices,
        namespace=target.namespace,
        auto_partition=target.auto_partition,
    )
    says = f"Each pod of {service.name} gets {devices} x {accelerator.name} {mode.label} of its own."
    return (f"{says}\n{AUTO_PARTITION}" if target.auto_partition else says), template


def _template_name(service: Service) -> str:
    return f"{service.name}-gpus"


def _device(profile: Profile) -> tuple[Accelerator, PartitionMode]:
    if profile.metadata.gpu not in catalog():
        raise RenderError(
            f"metadata.gpu: {profile.metadata.gpu} is not in the catalogue",
            field="metadata.gpu",
            value=profile.metadata.gpu,
            remedy=f"the known ones are {', '.join(catalog())}",
        )
    accelerator = by_name(profile.metadata.gpu)
    use = profile.partition
    return accelerator, accelerator.mode(use.label if use else "SPX", use.deployment if use else "bare-metal")


def _resource(mode: PartitionMode, accelerator: Accelerator, target: Target) -> str | None:
    return None if target.allocation == "dra" else resource_name(mode, accelerator, target.strategy)


def _where(service: Service, mode: PartitionMode, accelerator: Accelerator, target: Target) -> dict[str, Any]:
    selector: dict[str, str] = {}
    if target.strategy == "single" and accelerator.partitionable:
        selector[PARTITION_LABEL] = mode.resource_label
    if len(service.nodes) == 1:
        selector[_HOSTNAME] = service.nodes[0]
    expressions = [one_of(_HOSTNAME, service.nodes)] if len(service.nodes) > 1 else []
    if target.allocation == "plugin":
        # Every product in one mode is advertised under one name: what the profile was sized for, its PCI ids say. A
        # claim says it itself.
        expressions.append(product_of(accelerator))
    found: dict[str, Any] = {"nodeSelector": selector}
    if expressions:
        terms = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
        found["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    if service.spread:
        found["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": _HOSTNAME,
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"serving.kserve.io/inferenceservice": service.name}},
            }
        ]
    return found


def flags_of(profile: Profile) -> list[str]:
    """The runtime's flags beyond those of its ServingRuntime and its annotations."""
    tensor_parallel = profile.engine_arg("tensor-parallel-size")
    flags = [f"--tensor_parallel_size={tensor_parallel}"] if tensor_parallel not in (None, 1) else []
    rest = {key.replace("_", "-"): value for key, value in profile.engine_args.items()}
    # AIM writes a flag without a value as null, the runtime as true.
    rest = {key: True if value is None else value for key, value in rest.items() if key not in _OWN_SETTINGS}
    return [*flags, f"--engine_args={json.dumps(rest)}"] if rest else flags


def _comment(service: Service, target: Target) -> str:
    profile, (accelerator, mode) = service.profile, _device(service.profile)
    devices = max(1, profile.metadata.gpu_count)
    lines = [
        f"{profile.aim_id or 'any model'}: {devices} x {accelerator.name} {mode.label} ({mode.tier} on "
        f"{mode.deployment}), {profile.metadata.type}, {'measured' if profile.evidence.measured else 'not measured'}"
    ]
    if devices > 1 and mode.partitions > 1:
        lines.append(_siblings(devices, mode, target))
    if profile.unproven:
        lines.append(
            "Tensor parallelism over partitions is unproven (vllm#20125), whatever the mode's tier: read its answers."
        )
    if profile.evidence.weights == "needs a quantised checkpoint":
        lines.append(
            f"Point storageUri at a checkpoint that holds {profile.metadata.precision}: the published one does not."
        )
    return "\n".join(lines)


def _siblings(devices: int, mode: PartitionMode, target: Target) -> str:
    if target.allocation == "plugin":
        return "The device plugin prefers siblings of one card; it does not promise them."
    if devices > mode.partitions:
        return "They are of several cards of one node."
    return "The claim makes them siblings of one card."


def _runtime_name(accelerator: Accelerator) -> str:
    return f"aim-vllm-{accelerator.gfx}"
