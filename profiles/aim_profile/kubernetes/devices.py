"""What a pod asks for to get its devices, and the nodes that have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aim_profile.gpus.catalog import Accelerator, PartitionMode
from aim_profile.plans.dcm import Strategy

from .claims import CLAIM

# The node labeller's, of a node whose cards have one PCI id (`74a1`): k8s-device-plugin ed76468; AIM's controller
# selects by it too (aim-engine@9223504). Product names differ between driver releases, ids do not.
DEVICE_ID_LABEL = "amd.com/gpu.device-id"
# AIM's controller gives a GPU 4 CPUs and 32 GiB (aim-engine@9223504); a part of one its part, but never less than
# an engine needs to start.
CPUS_PER_CARD, MEMORY_GIB_PER_CARD = 4, 32
_LEAST_MEMORY_GIB = 8


def resource_name(mode: PartitionMode, accelerator: Accelerator, strategy: Strategy) -> str:
    """What the device plugin calls a device of that mode."""
    # The device plugin names GPUs without partition files amd.com/gpu under either strategy.
    if strategy == "single" or not accelerator.partitionable:
        return "amd.com/gpu"
    return f"amd.com/{mode.resource_label}"


def resources_of(resource: str | None, devices: int, mode: PartitionMode) -> dict[str, Any]:
    """What a container asks for that gets `devices` of `resource`, each a device of `mode`; None: they are claimed."""
    cpus = max(1, CPUS_PER_CARD // mode.partitions) * devices
    memory_gib = max(_LEAST_MEMORY_GIB, MEMORY_GIB_PER_CARD // mode.partitions) * devices
    counted = {resource: str(devices)} if resource else {}
    claimed = {} if resource else {"claims": [{"name": CLAIM}]}
    return {
        "requests": {"cpu": str(cpus), "memory": f"{memory_gib}Gi", **counted},
        # Half as much again, as AIM's controller allows; and what /dev/shm may take.
        "limits": {"memory": f"{memory_gib * 3 // 2 + 8}Gi", **counted},
        **claimed,
    }


def product_of(accelerator: Accelerator) -> dict[str, Any]:
    """The match expression for nodes with GPUs of that product."""
    return one_of(DEVICE_ID_LABEL, [f"{known.id:04x}" for known in accelerator.pci_ids])


def one_of(label: str, values: Sequence[str]) -> dict[str, Any]:
    """A match expression: the node's label has one of the values."""
    return {"key": label, "operator": "In", "values": list(values)}
