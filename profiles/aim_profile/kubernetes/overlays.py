"""The overlays of manifests/: what a cluster of one kind gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aim_profile.gpus.catalog import Accelerator, by_name
from aim_profile.serving.engine_args import environment

from .devices import product_of
from .kustomize import added, dropped, kustomization, patched
from .runtimes import ANY_GPU, CPU_IMAGE, SGLANG_IMAGE, dashed
from .serving_runtime import environment_variables

_EACH = ".*"
#: Where a user id without a home writes.
RESTRICTED_HOME: Mapping[str, Any] = {
    "env": {"name": "HOME", "value": "/tmp"},
    "mount": {"name": "tmp", "mountPath": "/tmp"},
    "volume": {"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}},
}
_ON_GPUS = "^aim-(vllm|sglang)(-[cdqst]px-nps[124](-dra)?)?$"
_VLLM_ON_GPUS = "^aim-vllm(-[cdqst]px-nps[124](-dra)?)?$"


def overlays() -> dict[str, str]:
    """Each overlay's kustomization.yaml."""
    made = {
        "dev-cpu": kustomization(["../../base"], [CPU_IMAGE], [dropped("aim-vllm"), dropped("aim-sglang")]),
        "openshift": _openshift("mi300x-cpx"),
    }
    for product in ("MI300X", "MI355X"):
        name = f"{product.lower()}-cpx"
        made[name] = _on_product(by_name(product), "CPX")
        made[f"{name}-dra"] = _on_product(by_name(product), "CPX", claimed=True)
    return {f"overlays/{name}/kustomization.yaml": text for name, text in sorted(made.items())}


def _on_product(accelerator: Accelerator, compute: str, *, claimed: bool = False) -> str:
    """The overlay for nodes of one product in one compute mode: GPU runtimes only, each bound to that product."""
    labels = sorted(mode.resource_label for mode in accelerator.modes() if mode.compute == compute)
    suffix = "-dra" if claimed else ""
    patches = [dropped("aim-vllm-cpu"), patched(_VLLM_ON_GPUS, _variables(accelerator))]
    if not claimed:
        patches.append(patched(_ON_GPUS, [added("/spec/affinity", affinity_of(accelerator))]))
    return kustomization(
        ["../../base", *(f"../../partitions/{dashed(label)}{suffix}" for label in labels)],
        ["aim-runtime", SGLANG_IMAGE, CPU_IMAGE],
        patches,
    )


def product_variables(accelerator: Accelerator) -> list[dict[str, str]]:
    """What vLLM's containers are told on that product, beyond what every GPU's are."""
    own = environment(accelerator, accelerator.mode("SPX"), 1)
    return environment_variables({name: value for name, value in own.items() if name not in ANY_GPU})


def affinity_of(accelerator: Accelerator) -> dict[str, Any]:
    """Only nodes of that product."""
    terms = {"nodeSelectorTerms": [{"matchExpressions": [product_of(accelerator)]}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _variables(accelerator: Accelerator) -> list[dict[str, Any]]:
    return [added("/spec/containers/0/env/-", each) for each in product_variables(accelerator)]


def _openshift(on: str) -> str:
    """For OpenShift's restricted-v2: any user id of the namespace's, whose home is nobody's. What the engines write
    goes into a volume."""
    operations = [
        added("/spec/containers/0/env/-", RESTRICTED_HOME["env"]),
        added("/spec/containers/0/volumeMounts/-", RESTRICTED_HOME["mount"]),
        added("/spec/volumes/-", RESTRICTED_HOME["volume"]),
    ]
    return kustomization([f"../{on}"], (), [patched(_EACH, operations)])
