"""What the cluster's nodes have of AMD's devices, as the device plugin advertises it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from aim_profile.gpus.catalog import Accelerator, PartitionMode, by_pci_id, catalog

_PREFIX = "amd.com/"
_DEVICE_ID = "amd.com/gpu.device-id"


class Offer(NamedTuple):
    """One resource of one node. accelerator: None: its labels do not say, or not one that is known."""

    node: str
    resource: str
    number: int
    accelerator: str | None


class Devices:
    """Of all nodes. Nodes that are cordoned count: they are there, and come back."""

    def __init__(self, nodes: Iterable[Mapping[str, Any]]) -> None:
        self.offers: Sequence[Offer] = [offer for node in nodes for offer in _offers(node)]

    def of(self, resource: str) -> list[Offer]:
        """Who has some of it."""
        return [offer for offer in self.offers if offer.resource == resource and offer.number > 0]

    @property
    def resources(self) -> dict[str, int]:
        """resource → the most of it that one node has."""
        most: dict[str, int] = {}
        for offer in self.offers:
            if offer.number > 0:
                most[offer.resource] = max(offer.number, most.get(offer.resource, 0))
        return dict(sorted(most.items()))

    def modes(self, resource: str) -> list[PartitionMode]:
        """What a device of that resource may be, on the products that have it here."""
        products = {offer.accelerator for offer in self.of(resource)}
        return [
            mode
            for accelerator in catalog_of(products)
            for mode in accelerator.modes()
            if resource == resource_of(mode, accelerator)
        ]


def catalog_of(names: Iterable[str | None]) -> list[Accelerator]:
    """Accelerators by name; those that the catalogue lacks are left out."""
    return [catalog()[name] for name in sorted(filter(None, names)) if name in catalog()]


def resource_of(mode: PartitionMode, accelerator: Accelerator) -> str:
    """What the device plugin calls a device of that mode under its mixed strategy."""
    return f"{_PREFIX}{mode.resource_label}" if accelerator.partitionable else f"{_PREFIX}gpu"


def known_resources() -> set[str]:
    """Every name that the device plugin may give, under either strategy."""
    return {f"{_PREFIX}gpu"} | {
        resource_of(mode, accelerator) for accelerator in catalog().values() for mode in accelerator.modes()
    }


def _offers(node: Mapping[str, Any]) -> Iterable[Offer]:
    accelerator = accelerator_of((node["metadata"].get("labels") or {}).get(_DEVICE_ID, ""))
    for resource, count in (node.get("status", {}).get("allocatable") or {}).items():
        if resource.startswith(_PREFIX):
            yield Offer(node["metadata"]["name"], resource, int(count), accelerator)


def accelerator_of(device_id: str) -> str | None:
    """By the PCI id as the node labeller writes it, `74a1`."""
    try:
        found = by_pci_id(int(device_id, 16))
    except ValueError:
        return None
    return found.name if isinstance(found, Accelerator) else None
