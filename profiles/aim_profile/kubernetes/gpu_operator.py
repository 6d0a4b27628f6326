"""AMD's GPU operator as the rest of manifests/ wants it: a DeviceConfig for each way to devices."""

from __future__ import annotations

from typing import Any

from .claims import DEVICE_CLASS
from .kustomize import folder_of
from .plan_objects import DCM_CONFIG_MAP
from .target import Allocation, Target

# Our selectors need device-id, and under the single strategy compute-memory-partition, which is not among the defaults.
_LABELS = (
    *("vram", "cu-count", "simd-count", "device-id", "family", "product-name", "driver-version"),
    *("compute-memory-partition", "compute-partitioning-supported", "memory-partitioning-supported"),
)
_SAYS = {
    "plugin": "The device plugin names partitions by their mode (mixed), and the node labeller says what they are.",
    "dra": f"The DRA driver in the device plugin's place, with its DeviceClass {DEVICE_CLASS} (operator 1.5.1).",
}
_MODES = "\nThe Device Config Manager takes its modes from what `aim-profile render PLAN` writes."


def device_configs() -> dict[str, str]:
    """A Kustomize folder for each way: one of them is applied, in the operator's namespace."""
    found: dict[str, str] = {}
    ways: tuple[Allocation, ...] = ("plugin", "dra")
    for way in ways:
        found |= folder_of(f"gpu-operator/{way}", {"device-config": [(_SAYS[way] + _MODES, _device_config(way))]})
    return found


def _device_config(way: Allocation) -> dict[str, Any]:
    plugin = {
        "enableDevicePlugin": True,
        "devicePluginArguments": {"resource_naming_strategy": "mixed"},
        "enableNodeLabeller": True,
        "nodeLabellerArguments": list(_LABELS),
    }
    claims = {"devicePlugin": {"enableDevicePlugin": False}, "draDriver": {"enable": True}}
    return {
        "apiVersion": "amd.com/v1alpha1",
        "kind": "DeviceConfig",
        "metadata": {"name": "amd-gpus", "namespace": Target().operator_namespace},
        "spec": {
            **({"devicePlugin": plugin} if way == "plugin" else claims),
            "configManager": {"enable": True, "config": {"name": DCM_CONFIG_MAP}},
            "selector": {"feature.node.kubernetes.io/amd-gpu": "true"},
        },
    }
