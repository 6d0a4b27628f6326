"""Devices as claims of AMD's DRA driver (Kubernetes' Dynamic Resource Allocation, `resource.k8s.io/v1`: since 1.34).

A claim names what the device plugin cannot: the product beside the partition mode, and that the partitions of one pod
are siblings of one card. Memory is the planner's business: every device of a mode has as much.

Attributes and DeviceClass as ROCm/k8s-gpu-dra-driver 1.0.1 publishes them. What a device lacks ends an expression with
an error, and the whole allocation with it, so that each clause stands behind one that keeps such devices out: a card
that cannot be partitioned is of type `amdgpu` and has no `partitionProfile`.
"""

from __future__ import annotations

from typing import Any

from aim_profile.gpus.catalog import Accelerator, PartitionMode

#: The claim's name inside the pod.
CLAIM = "gpus"
DRIVER = DEVICE_CLASS = "gpu.amd.com"
#: One for all partitions of a card (partitions publish it in place of `deviceID`).
SIBLINGS = f"{DRIVER}/parentDeviceID"
AUTO_PARTITION = (
    "For AMD's coming repartitioning: the driver's feature gate AutoPartition (ROCm/k8s-gpu-dra-driver#88, open in\n"
    "September 2026) puts a card into the mode that a claim names. As its review reads, one of its devices is a whole\n"
    "card in a mode, so this claim takes the card, whatever part of it the pod uses. Today's driver gives nothing for\n"
    "it. Names may still change: hold this against the release."
)


def claim_template(
    name: str,
    mode: PartitionMode,
    accelerator: Accelerator,
    devices: int,
    *,
    namespace: str | None = None,
    auto_partition: bool = False,
) -> dict[str, Any]:
    """The ResourceClaimTemplate of which each pod gets `devices` of that product in that mode.

    Several are siblings of one card, where one card has as many. auto_partition: cards that are put into the mode for
    it (AUTO_PARTITION says how far that is known).
    """
    count = -(-devices // mode.partitions) if auto_partition else devices
    exactly = {
        "deviceClassName": DEVICE_CLASS,
        "allocationMode": "ExactCount",
        "count": count,
        "selectors": [{"cel": {"expression": selector(mode, accelerator, auto_partition=auto_partition)}}],
    }
    asked: dict[str, Any] = {"requests": [{"name": CLAIM, "exactly": exactly}]}
    if 1 < count <= mode.partitions and not auto_partition:
        asked["constraints"] = [{"requests": [CLAIM], "matchAttribute": SIBLINGS}]
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {"name": name, **({"namespace": namespace} if namespace else {})},
        "spec": {"spec": {"devices": asked}},
    }


def selector(mode: PartitionMode, accelerator: Accelerator, *, auto_partition: bool = False) -> str:
    """The CEL expression that is true of the devices of that product in that mode, and no other device's error."""
    names = ", ".join(f'"{name}"' for name in product_names(accelerator))
    product = f"{_attribute('productName')} in [{names}]"
    if not accelerator.partitionable:
        return f'{_attribute("type")} == "amdgpu" && {product}'
    profile = f'{_attribute("partitionProfile")} == "{mode.resource_label}"'
    if auto_partition:
        return f"{product} && has({_attribute('partitionProfile')}) && {profile}"
    kind = "amdgpu" if mode.partitions == 1 else "amdgpu-partition"
    return f'{_attribute("type")} == "{kind}" && {product} && {profile}'


def product_names(accelerator: Accelerator) -> tuple[str, ...]:
    """The product's marketing names as the driver writes them: `AMD_Instinct_MI300X_OAM`."""
    kept = str.maketrans({" ": "_", "(": None, ")": None})
    return tuple(name.translate(kept) for name in accelerator.marketing_names)


def pod_claims(template: str) -> list[dict[str, str]]:
    """`resourceClaims` of a pod that gets its own claim of the template."""
    return [{"name": CLAIM, "resourceClaimTemplateName": template}]


def _attribute(name: str) -> str:
    return f'device.attributes["{DRIVER}"].{name}'
