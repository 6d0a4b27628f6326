"""A plan as Kueue's quotas: what serving leaves of each kind of device is what jobs may queue for.

API `kueue.x-k8s.io/v1beta2`. A flavor is a product in a mode; a group covers one resource, so that no flavor has to
list what it has none of.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from aim_profile.gpus.catalog import by_name
from aim_profile.nodes.facts import CPU
from aim_profile.plans.dcm import PARTITION_LABEL
from aim_profile.plans.plan import CardPlan, Plan

from .devices import CPUS_PER_CARD, DEVICE_ID_LABEL, MEMORY_GIB_PER_CARD, resource_name
from .kserve import Document
from .target import RenderError, Target

_API = "kueue.x-k8s.io/v1beta2"
_HOSTS = "aim-hosts"
_SAYS = (
    "What the plan's services leave, for jobs: services are not queued. CPUs and memory are AIM's for each card that\n"
    "has something left: give your nodes' figures."
)
_CLAIMED = (
    "\nKueue counts claims where its configuration maps AMD's DeviceClass:\n"
    "  resources: {deviceClassMappings: [{name: amd.com/gpu, deviceClassNames: [gpu.amd.com]}]}"
)


class _Kind(NamedTuple):
    """Devices that are counted together."""

    flavor: str
    resource: str
    labels: tuple[tuple[str, str], ...]


def cluster_queue_of(plan: Plan, name: str, target: Target) -> list[Document]:
    """The ResourceFlavors and the ClusterQueue `name`. Raises RenderError where the plan has no GPU."""
    held = {(run.node, card, part) for run in plan.placements if run.kind != "finetune" for card, part in run.devices}
    free: Counter[_Kind] = Counter()
    cards = 0
    for card in plan.cards:
        if card.mode is None or card.gpu == CPU:
            continue
        left = sum((card.node, card.card, part) not in held for part in range(card.partitions))
        free[_kind(card, target)] += left
        cards += left > 0
    if not free:
        raise RenderError(
            "the plan has no GPU to queue for", field="cluster-queue", value=name, remedy="leave out --cluster-queue"
        )
    flavors = [("", _flavor(kind.flavor, dict(kind.labels))) for kind in free]
    says = _SAYS + (_CLAIMED if target.allocation == "dra" else "")
    return [("", _flavor(_HOSTS, {})), *flavors, (says, _cluster_queue(name, free, cards))]


def _kind(card: CardPlan, target: Target) -> _Kind:
    if target.allocation == "dra":
        return _Kind("amd-gpus", "amd.com/gpu", ())
    accelerator = by_name(card.gpu)
    mode = accelerator.mode(str(card.mode))
    function = "vf" if card.deployment == "sr-iov" else "pf"
    # A flavor takes one value of a label: the product's first id, variants have others.
    ids = [known.id for known in accelerator.pci_ids if known.function == function] or [accelerator.pci_ids[0].id]
    labels = [(DEVICE_ID_LABEL, f"{ids[0]:04x}")]
    if target.strategy == "single" and accelerator.partitionable:
        labels.append((PARTITION_LABEL, mode.resource_label))
    suffix = "-vf" if function == "vf" else ""
    flavor = f"{card.gpu.lower()}-{mode.resource_label.replace('_', '-')}{suffix}"
    return _Kind(flavor, resource_name(mode, accelerator, target.strategy), tuple(labels))


def _flavor(name: str, labels: dict[str, str]) -> dict[str, Any]:
    spec = {"nodeLabels": labels} if labels else {}
    return {"apiVersion": _API, "kind": "ResourceFlavor", "metadata": {"name": name}, "spec": spec}


def _cluster_queue(name: str, free: Counter[_Kind], cards: int) -> dict[str, Any]:
    hosts = {"cpu": str(CPUS_PER_CARD * cards), "memory": f"{MEMORY_GIB_PER_CARD * cards}Gi"}
    by_resource: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for kind, count in free.items():
        by_resource.setdefault(kind.resource, []).append((kind.flavor, {kind.resource: str(count)}))
    groups = [_group(flavors) for flavors in ([(_HOSTS, hosts)], *by_resource.values())]
    return {
        "apiVersion": _API,
        "kind": "ClusterQueue",
        "metadata": {"name": name},
        # Whose LocalQueue points here may use it.
        "spec": {"namespaceSelector": {}, "resourceGroups": groups},
    }


def _group(flavors: list[tuple[str, dict[str, str]]]) -> dict[str, Any]:
    return {
        "coveredResources": list(flavors[0][1]),
        "flavors": [
            {
                "name": name,
                "resources": [{"name": resource, "nominalQuota": quota} for resource, quota in quotas.items()],
            }
            for name, quotas in flavors
        ],
    }
