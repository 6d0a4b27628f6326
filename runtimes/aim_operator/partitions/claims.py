"""Which device a pod's DRA claim was given (AMD's driver, k8s-gpu-dra-driver 1.0.1), as card and partition of its node.

The driver names devices by their files (`gpu-<card>-<render>`); a plan counts cards in the order of their addresses and
partitions in the order of their render nodes. Its ResourceSlices have both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aim_operator.cluster import RESOURCE_CLAIMS, RESOURCE_SLICES, Cluster

_DRIVER = "gpu.amd.com"


async def device_of(cluster: Cluster, pod: Mapping[str, Any]) -> tuple[str, str] | None:
    """Card and partition, `0,1` where there are several; None where the pod has no claim of that driver."""
    namespace, node = pod["metadata"]["namespace"], pod["spec"]["nodeName"]
    names = [each.get("resourceClaimName") for each in pod.get("status", {}).get("resourceClaimStatuses") or ()]
    names += [each.get("resourceClaimName") for each in pod["spec"].get("resourceClaims") or ()]
    given: list[str] = []
    for name in dict.fromkeys(filter(None, names)):
        claim = await cluster.get(RESOURCE_CLAIMS, str(name), namespace) or {}
        results = claim.get("status", {}).get("allocation", {}).get("devices", {}).get("results") or ()
        given += [each["device"] for each in results if each.get("driver") == _DRIVER]
    if not given:
        return None
    places = await _places(cluster, node)
    found = sorted(places[name] for name in given if name in places)
    if not found:
        return None
    cards = dict.fromkeys(str(card) for card, _ in found)
    return ",".join(cards), ",".join(str(partition) for _, partition in found)


async def _places(cluster: Cluster, node: str) -> dict[str, tuple[int, int]]:
    """Card and partition of each device name on the node."""
    by_card: dict[str, list[tuple[int, str]]] = {}
    for each in await cluster.list(RESOURCE_SLICES):
        spec = each["spec"]
        if spec.get("driver") != _DRIVER or spec.get("nodeName") != node:
            continue
        for device in spec.get("devices") or ():
            told = {name: next(iter(value.values())) for name, value in (device.get("attributes") or {}).items()}
            address = str(told.get("parentPciAddr") or told.get("pciAddr") or "")
            by_card.setdefault(address, []).append((int(told.get("renderIndex", 0)), device["name"]))
    return {
        name: (card, partition)
        for card, address in enumerate(sorted(by_card))
        for partition, (_, name) in enumerate(sorted(by_card[address]))
    }
