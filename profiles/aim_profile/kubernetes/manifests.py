"""The folder `manifests/`, whole: base, partitions, overlays and samples as files, from the catalogue and the renderer.

Nothing in it is written by hand: `write` makes it, `drift` says what is not as it would be made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from aim_profile.files.write import dump, dump_all
from aim_profile.gpus.catalog import Accelerator, PartitionMode, by_name, catalog
from aim_profile.models.known import by_id
from aim_profile.serving.derive import Refusal, Wanted, derive
from aim_profile.serving.engine_args import environment

from .claims import claim_template, pod_claims
from .devices import product_of, resources_of
from .generated import MARK, Generated
from .kserve import Document, Service, inference_service, service_name
from .serving_runtime import (
    NAME_LABEL,
    PODINFO_MOUNT,
    PODINFO_VOLUME,
    PORTS,
    RESTRICTED,
    ModelFormat,
    environment_variables,
    image_of,
    probes,
    release,
    serving_runtime,
)
from .target import RenderError, Target

# Folders of manifests/ that others make.
_ELSEWHERE = frozenset({"crds", "operator", "monitoring"})
_CPU_IMAGE, _SGLANG_IMAGE, _GUARDRAIL_IMAGE = "aim-runtime-cpu", "aim-runtime-sglang", "aim-guardrail"
_SAMPLE_MODEL, _SAMPLE_GPU, _SAMPLE_MODE = "Qwen/Qwen3-8B", "MI300X", "CPX/NPS4"
_CPU_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Both targets of AITER want it; it changes nothing elsewhere.
_ANY_GPU = {"HSA_NO_SCRATCH_RECLAIM": "1"}
_CPU_RESOURCES = {"requests": {"cpu": "4", "memory": "8Gi"}, "limits": {"memory": "16Gi"}}


class _Runtime(NamedTuple):
    name: str
    engine: str
    formats: tuple[ModelFormat, ...]
    image: str
    says: str
    variables: Mapping[str, str] = {}
    resources: Mapping[str, Any] | None = None


# KServe's own runtimes choose themselves for `huggingface`: ours take it only from who names them, so that installing
# them moves no service that is there. Of `safetensors` each overlay leaves one that its nodes can run.
_HUGGINGFACE = ModelFormat("huggingface")
_RUNTIMES = (
    _Runtime(
        "aim-vllm",
        "vllm",
        (_HUGGINGFACE, ModelFormat("safetensors", 3)),
        "aim-runtime",
        "vLLM on whole GPUs or partitions; the InferenceService asks for them.",
        _ANY_GPU,
    ),
    _Runtime(
        "aim-sglang",
        "sglang",
        (_HUGGINGFACE, ModelFormat("safetensors", 2)),
        _SGLANG_IMAGE,
        "SGLang's own server as a child of the runtime; the InferenceService asks for GPUs or partitions.",
        _ANY_GPU,
    ),
    _Runtime(
        "aim-vllm-cpu",
        "vllm",
        (_HUGGINGFACE, ModelFormat("safetensors", 1)),
        _CPU_IMAGE,
        "vLLM without a GPU, for development.",
        {},
        _CPU_RESOURCES,
    ),
    _Runtime(
        "aim-llamacpp",
        "llama_cpp",
        (ModelFormat("gguf", 1),),
        _CPU_IMAGE,
        "llama.cpp on CPUs: one .gguf file below /mnt/models.",
        {},
        _CPU_RESOURCES,
    ),
)


def manifests() -> dict[str, str]:
    """Every file of the folder: path below it → text."""
    return {
        **_folder("base", {each.name: [(each.says, _base(each))] for each in _RUNTIMES}),
        **_partitions(),
        **_claims(),
        "overlays/dev-cpu/kustomization.yaml": _kustomization(
            ["../../base"], [_CPU_IMAGE], [_dropped("aim-vllm"), _dropped("aim-sglang")]
        ),
        "overlays/mi300x-cpx/kustomization.yaml": _on_product(by_name("MI300X"), "CPX"),
        "overlays/mi355x-cpx/kustomization.yaml": _on_product(by_name("MI355X"), "CPX"),
        **_folder("samples/one-model-cpu", {"one-model-cpu": [(_ONE_CPU, _cpu_service())]}),
        **_folder("samples/one-model", {"one-model": [(_ONE, _service())]}),
        **_folder("samples/guarded-model", {"guarded-model": _guarded()}, [_GUARDRAIL_IMAGE]),
    }


def write(folder: Path) -> list[str]:
    """Makes the folder anew. Returns what `drift` said before. Raises RenderError as `Generated.write` does."""
    return generated().write(folder)


def drift(folder: Path) -> list[str]:
    """What is not as it is made; what others make is passed over."""
    return generated().drift(folder)


def generated() -> Generated:
    """The folder but for what others make of it."""
    return Generated(manifests(), _ELSEWHERE)


def _folder(path: str, documents: Mapping[str, Sequence[Document]], images: Iterable[str] = ()) -> dict[str, str]:
    """A Kustomize folder: each file's objects, and the list of the files."""
    files = {f"{path}/{name}.yaml": _marked(dump_all(each)) for name, each in documents.items()}
    names = [PurePosixPath(name).name for name in files]
    return {f"{path}/kustomization.yaml": _kustomization(names, images), **files}


def _kustomization(resources: Sequence[str], images: Iterable[str] = (), patches: Sequence[dict[str, Any]] = ()) -> str:
    body: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(resources),
    }
    # A tag here is where a user's registry goes, too: newName.
    if listed := [{"name": name, "newTag": release()} for name in images]:
        body["images"] = listed
    if patches:
        body["patches"] = list(patches)
    return _marked(dump(body))


def _marked(text: str) -> str:
    return f"# {MARK}\n{text}"


def _dropped(name: str) -> dict[str, Any]:
    """The patch that leaves a runtime of the base out."""
    gone = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ClusterServingRuntime",
        "metadata": {"name": name},
        "$patch": "delete",
    }
    return {"target": {"kind": "ClusterServingRuntime", "name": f"^{name}$"}, "patch": dump(gone)}


def _base(each: _Runtime) -> dict[str, Any]:
    return serving_runtime(
        each.name, each.engine, each.formats, image_of(each.image), each.variables, resources=each.resources
    )


def _partitions() -> dict[str, str]:
    """A folder for each resource that the device plugin names under its mixed strategy."""
    modes: dict[str, list[tuple[Accelerator, PartitionMode]]] = {}
    for accelerator in map(by_name, catalog()):
        for mode in accelerator.modes() if accelerator.partitionable else ():
            modes.setdefault(mode.resource_label, []).append((accelerator, mode))
    found: dict[str, str] = {}
    for label, kinds in sorted(modes.items()):
        folder, name, says = f"partitions/{_dashed(label)}", _variant(label), _partition_says(kinds)
        found |= _folder(folder, {name: [(says, _partition(name, kinds))]})
        claimed = f"{says}\n{_CLAIMED}"
        found |= _folder(f"{folder}-dra", {f"{name}-dra": [(claimed, _partition(f"{name}-dra", kinds, claimed=True))]})
    return found


def _partition(
    name: str, kinds: Sequence[tuple[Accelerator, PartitionMode]], *, claimed: bool = False
) -> dict[str, Any]:
    """vLLM on one device of that kind, by name only: which partition a model needs is nothing to guess."""
    # Of the cards that have it the one that is divided into most: its part of the CPUs is there on all of them.
    smallest = max((mode for _, mode in kinds), key=lambda mode: mode.partitions)
    resources = resources_of(None if claimed else f"amd.com/{smallest.resource_label}", 1, smallest)
    made = serving_runtime(name, "vllm", (_HUGGINGFACE, ModelFormat("safetensors")), None, _ANY_GPU, resources)
    if claimed:
        made["spec"]["resourceClaims"] = pod_claims(_claim_name(smallest, 1))
    return made


def _claims() -> dict[str, str]:
    """A folder for each product: the templates that its runtimes' claims name, and those of siblings."""
    found: dict[str, str] = {}
    for accelerator in map(by_name, catalog()):
        documents: list[Document] = []
        for mode in accelerator.modes() if accelerator.partitionable else ():
            for devices in [count for count in (1, 2, 4, 8) if count <= mode.partitions]:
                says = f"{devices} x {accelerator.name} {mode.label} ({mode.tier})" + ", of one card" * (devices > 1)
                documents.append((says, claim_template(_claim_name(mode, devices), mode, accelerator, devices)))
        if documents:
            found |= _folder(f"claims/{accelerator.name.lower()}", {"claims": documents})
    return found


def _claim_name(mode: PartitionMode, devices: int) -> str:
    return f"aim-{_dashed(mode.resource_label)}" + (f"-x{devices}" if devices > 1 else "")


_CLAIMED = (
    "Its device is claimed of AMD's DRA driver: claims/PRODUCT has the ResourceClaimTemplate, for the service's\n"
    "namespace. A service that wants siblings of one card names another template in its own resourceClaims."
)


def _partition_says(kinds: Sequence[tuple[Accelerator, PartitionMode]]) -> str:
    cards = [f"{mode.partitions} on an {card.name} ({mode.tier})" for card, mode in kinds]
    return f"vLLM on one {kinds[0][1].label} partition: " + ", ".join(cards) + "."


def _variant(label: str) -> str:
    return f"aim-vllm-{_dashed(label)}"


def _dashed(label: str) -> str:
    return label.replace("_", "-")


def _on_product(accelerator: Accelerator, compute: str) -> str:
    """The overlay for nodes of one product in one compute mode: GPU runtimes only, each bound to that product."""
    labels = sorted(mode.resource_label for mode in accelerator.modes() if mode.compute == compute)
    own = environment(accelerator, accelerator.mode("SPX"), 1)
    rest = {name: value for name, value in own.items() if name not in _ANY_GPU}
    variables = [_added("/spec/containers/0/env/-", each) for each in environment_variables(rest)]
    terms = {"nodeSelectorTerms": [{"matchExpressions": [product_of(accelerator)]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    return _kustomization(
        ["../../base", *(f"../../partitions/{_dashed(label)}" for label in labels)],
        ["aim-runtime", _SGLANG_IMAGE, _CPU_IMAGE],
        [
            _dropped("aim-vllm-cpu"),
            _patched("^aim-vllm(-[cdqst]px-nps[124])?$", variables),
            _patched("^aim-(vllm|sglang)(-[cdqst]px-nps[124])?$", [_added("/spec/affinity", affinity)]),
        ],
    )


def _added(path: str, value: Any) -> dict[str, Any]:
    return {"op": "add", "path": path, "value": value}


def _patched(names: str, operations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"target": {"kind": "ClusterServingRuntime", "name": names}, "patch": dump(list(operations))}


_ONE_CPU = "One model without a GPU: needs overlays/dev-cpu."
_ONE = (
    f"One model on one {_SAMPLE_MODE} partition of an {_SAMPLE_GPU}: needs overlays/mi300x-cpx.\n"
    "A changed storageUri or image stops the old pod before the new one starts (maxSurge 0), since the new one may\n"
    "need the very partition that the old one holds: with one replica nobody answers while the new one loads."
)
_GUARDED = (
    f"{_ONE}\nThe guardrail is KServe's transformer before it: aim.amd.com/guardrail-policy names its policy.\n"
    "KServe gives it --model_name, --predictor_host and --http_port."
)
_NO_WAY_ROUND = (
    "Nobody but the guardrail reaches the model. Let your Prometheus in by a second rule if it scrapes the predictor."
)


def _cpu_service() -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": service_name(_CPU_MODEL),
            "annotations": {"serving.kserve.io/deploymentMode": "Standard"},
        },
        "spec": {
            "predictor": {
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 60,
                "model": {
                    "modelFormat": {"name": "safetensors", "version": "1"},
                    "storageUri": f"hf://{_CPU_MODEL}",
                    "args": ["--max_model_len=2048"],
                    "resources": _CPU_RESOURCES,
                },
            }
        },
    }


def _service(suffix: str = "") -> dict[str, Any]:
    mode = by_name(_SAMPLE_GPU).mode(_SAMPLE_MODE)
    profile = derive(by_id(_SAMPLE_MODEL), mode, Wanted())
    if isinstance(profile, Refusal):
        raise RenderError(
            f"the samples' model: {profile.reason}", field="model", value=_SAMPLE_MODEL, remedy="choose one that fits"
        )
    target = Target(runtime=_variant(mode.resource_label))
    return inference_service(Service(service_name(_SAMPLE_MODEL) + suffix, profile), target)


def _guarded() -> list[Document]:
    service = _service("-guarded")
    name = service["metadata"]["name"]
    service["metadata"]["annotations"]["aim.amd.com/guardrail-policy"] = "chat"
    service["spec"]["transformer"] = {
        "minReplicas": 1,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 60,
        "labels": {NAME_LABEL: "aim-guardrail"},
        "containers": [_guardrail(name)],
        "volumes": [dict(PODINFO_VOLUME)],
    }
    return [(_GUARDED, service), (_NO_WAY_ROUND, _only_from_the_guardrail(name))]


def _guardrail(model_name: str) -> dict[str, Any]:
    return {
        "name": "kserve-container",
        "image": image_of(_GUARDRAIL_IMAGE),
        "command": ["python", "-m", "aim_guardrail"],
        "ports": [dict(port) for port in PORTS],
        **probes(model_name),
        # Without a limit of its own KServe gives a transformer one: 1 CPU.
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "2Gi"}},
        "securityContext": dict(RESTRICTED),
        "volumeMounts": [dict(PODINFO_MOUNT)],
    }


def _only_from_the_guardrail(name: str) -> dict[str, Any]:
    def pods(component: str) -> dict[str, Any]:
        return {"matchLabels": {"serving.kserve.io/inferenceservice": name, "component": component}}

    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{name}-predictor"},
        "spec": {
            "podSelector": pods("predictor"),
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [{"podSelector": pods("transformer")}],
                    "ports": [{"port": port["containerPort"], "protocol": port["protocol"]} for port in PORTS],
                }
            ],
        },
    }
