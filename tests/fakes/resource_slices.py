"""What AMD's DRA driver publishes of a node (ROCm/k8s-gpu-dra-driver 1.0.1), and a scheduler's allocation over it: the
claim's CEL expressions by a real CEL engine, its count and `matchAttribute` by trying."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import cel

Object = dict[str, Any]
_DRIVER = "gpu.amd.com"


def resource_slice(
    node: str, cards: int, partitions: int, profile: str | None = "cpx_nps4", product: str = "AMD_Instinct_MI300X_OAM"
) -> Object:
    """A node's devices. partitions: of each card, 1: whole cards; profile: None: cards that cannot be partitioned."""
    devices = [_device(card, part, partitions, profile, product) for card in range(cards) for part in range(partitions)]
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": f"{node}-gpu.amd.com-abcde"},
        "spec": {
            "driver": _DRIVER,
            "nodeName": node,
            "pool": {"name": node, "generation": 1, "resourceSliceCount": 1},
            "devices": devices,
        },
    }


def _device(card: int, part: int, partitions: int, profile: str | None, product: str) -> Object:
    index = card * 8 + part
    whole, of = partitions == 1, 700 + card
    attributes: Object = {
        "type": {"string": "amdgpu" if whole else "amdgpu-partition"},
        "pciAddr" if whole else "parentPciAddr": {"string": f"0003:00:{card:02x}.0"},
        "deviceID" if whole else "parentDeviceID": {"string": f"70668663305023602{of}"},
        "cardIndex": {"int": index},
        "renderIndex": {"int": 128 + index},
        "family": {"string": "AI"},
        "productName": {"string": product},
        "driverVersion": {"version": "6.16.6"},
        "driverSrcVersion": {"string": "A27BF33B4586326D747C9FB"},
        "resource.kubernetes.io/pcieRoot": {"string": f"pci0003:{card:02x}"},
    }
    if profile is not None:
        attributes["partitionProfile"] = {"string": profile}
    capacity = {"memory": {"value": f"{196592 // partitions}Mi"}, "computeUnits": {"value": str(304 // partitions)}}
    return {"name": f"gpu-{index}-{128 + index}", "attributes": attributes, "capacity": capacity}


def allocated(
    template: Object, slices: list[Object], taken: frozenset[tuple[str, str]] = frozenset()
) -> list[str] | None:
    """The devices that a pod with a claim of the template gets: on one node, none twice; None: it waits.

    taken: (node, device) of other claims. Raises where an expression fails on a device: Kubernetes gives up there, too.
    """
    asked = template["spec"]["spec"]["devices"]
    (request,) = asked["requests"]
    for each in slices:
        node = each["spec"]["nodeName"]
        fitting = [
            device
            for device in each["spec"]["devices"]
            if (node, device["name"]) not in taken and _fits(device, request["exactly"])
        ]
        for chosen in combinations(fitting, request["exactly"]["count"]):
            if all(len({*_values(chosen, rule["matchAttribute"])}) == 1 for rule in asked.get("constraints", [])):
                return [device["name"] for device in chosen]
    return None


def _fits(device: Object, exactly: Object) -> bool:
    assert exactly["deviceClassName"] == _DRIVER
    plain: Object = {}
    for name, value in device["attributes"].items():
        domain, _, short = name.rpartition("/")
        plain.setdefault(domain or _DRIVER, {})[short] = next(iter(value.values()))
    seen = {"device": {"driver": _DRIVER, "attributes": plain, "capacity": {}}}
    return all(cel.evaluate(each["cel"]["expression"], seen) is True for each in exactly["selectors"])


def _values(devices: tuple[Object, ...], attribute: str) -> Iterator[str | None]:
    # One that a device lacks matches nothing: each device is its own value.
    for device in devices:
        found = device["attributes"].get(attribute.removeprefix(f"{_DRIVER}/"))
        yield found["string"] if found else device["name"]
