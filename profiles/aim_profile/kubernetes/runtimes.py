"""The ClusterServingRuntimes of manifests/: the base, one for each partition resource and claim; claims' templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aim_profile.gpus.catalog import Accelerator, PartitionMode, by_name, catalog

from .claims import claim_template, pod_claims
from .devices import resources_of
from .kserve import Document
from .kustomize import folder_of
from .serving_runtime import ModelFormat, image_of, serving_runtime

CPU_IMAGE, SGLANG_IMAGE = "aim-runtime-cpu", "aim-runtime-sglang"
#: Both targets of AITER want it; it changes nothing elsewhere.
ANY_GPU = {"HSA_NO_SCRATCH_RECLAIM": "1"}
CPU_RESOURCES = {"requests": {"cpu": "4", "memory": "8Gi"}, "limits": {"memory": "16Gi"}}


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
        ANY_GPU,
    ),
    _Runtime(
        "aim-sglang",
        "sglang",
        (_HUGGINGFACE, ModelFormat("safetensors", 2)),
        SGLANG_IMAGE,
        "SGLang's own server as a child of the runtime; the InferenceService asks for GPUs or partitions.",
        ANY_GPU,
    ),
    _Runtime(
        "aim-vllm-cpu",
        "vllm",
        (_HUGGINGFACE, ModelFormat("safetensors", 1)),
        CPU_IMAGE,
        "vLLM without a GPU, for development.",
        {},
        CPU_RESOURCES,
    ),
    _Runtime(
        "aim-llamacpp",
        "llama_cpp",
        (ModelFormat("gguf", 1),),
        CPU_IMAGE,
        "llama.cpp on CPUs: one .gguf file below /mnt/models.",
        {},
        CPU_RESOURCES,
    ),
)


def base() -> dict[str, str]:
    """The runtimes that ask for no device of their own."""
    return folder_of("base", {each.name: [(each.says, _base(each))] for each in _RUNTIMES})


def _base(each: _Runtime) -> dict[str, Any]:
    return serving_runtime(
        each.name, each.engine, each.formats, image_of(each.image), each.variables, resources=each.resources
    )


def partitions() -> dict[str, str]:
    """A folder for each resource that the device plugin names under its mixed strategy."""
    modes: dict[str, list[tuple[Accelerator, PartitionMode]]] = {}
    for accelerator in map(by_name, catalog()):
        for mode in accelerator.modes() if accelerator.partitionable else ():
            modes.setdefault(mode.resource_label, []).append((accelerator, mode))
    found: dict[str, str] = {}
    for label, kinds in sorted(modes.items()):
        folder, name, says = f"partitions/{dashed(label)}", variant(label), _partition_says(kinds)
        found |= folder_of(folder, {name: [(says, _partition(name, kinds))]})
        claimed = f"{says}\n{_CLAIMED}"
        found |= folder_of(
            f"{folder}-dra", {f"{name}-dra": [(claimed, _partition(f"{name}-dra", kinds, claimed=True))]}
        )
    return found


def _partition(
    name: str, kinds: Sequence[tuple[Accelerator, PartitionMode]], *, claimed: bool = False
) -> dict[str, Any]:
    """vLLM on one device of that kind, by name only: which partition a model needs is nothing to guess."""
    # Of the cards that have it the one that is divided into most: its part of the CPUs is there on all of them.
    smallest = max((mode for _, mode in kinds), key=lambda mode: mode.partitions)
    resources = resources_of(None if claimed else f"amd.com/{smallest.resource_label}", 1, smallest)
    made = serving_runtime(name, "vllm", (_HUGGINGFACE, ModelFormat("safetensors")), None, ANY_GPU, resources)
    if claimed:
        made["spec"]["resourceClaims"] = pod_claims(_claim_name(smallest, 1))
    return made


def claims() -> dict[str, str]:
    """A folder for each product: the templates that its runtimes' claims name, and those of siblings."""
    found: dict[str, str] = {}
    for accelerator in map(by_name, catalog()):
        documents: list[Document] = []
        for mode in accelerator.modes() if accelerator.partitionable else ():
            for devices in [count for count in (1, 2, 4, 8) if count <= mode.partitions]:
                says = f"{devices} x {accelerator.name} {mode.label} ({mode.tier})" + ", of one card" * (devices > 1)
                documents.append((says, claim_template(_claim_name(mode, devices), mode, accelerator, devices)))
        if documents:
            found |= folder_of(f"claims/{accelerator.name.lower()}", {"claims": documents})
    return found


def _claim_name(mode: PartitionMode, devices: int) -> str:
    return f"aim-{dashed(mode.resource_label)}" + (f"-x{devices}" if devices > 1 else "")


_CLAIMED = (
    "Its device is claimed of AMD's DRA driver: claims/PRODUCT has the ResourceClaimTemplate, for the service's\n"
    "namespace. A service that wants siblings of one card names another template in its own resourceClaims."
)


def _partition_says(kinds: Sequence[tuple[Accelerator, PartitionMode]]) -> str:
    cards = [f"{mode.partitions} on an {card.name} ({mode.tier})" for card, mode in kinds]
    return f"vLLM on one {kinds[0][1].label} partition: " + ", ".join(cards) + "."


def variant(label: str) -> str:
    """The runtime of one partition: `aim-vllm-cpx-nps4`."""
    return f"aim-vllm-{dashed(label)}"


def dashed(label: str) -> str:
    """`cpx-nps4`."""
    return label.replace("_", "-")
