"""How a child is shown its own devices and no others.

In a pod whose devices are all one engine's nothing is set: the device plugin mounts them, KFD hides the others, and a
second filter leaves a container with none, or with its neighbour's. Elsewhere, and where several engines share a pod's
devices, ``ROCR_VISIBLE_DEVICES`` alone is set: it filters at the lowest level (HSA), where every partition is an agent
of its own; ``HIP_`` and ``CUDA_VISIBLE_DEVICES`` number what is left once more, and vLLM refuses to start where those
two disagree. By index, not by UUID: a UUID is made of the card's unique id, which all its partitions share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aim_profile.nodes.facts import Node

from .devices import gpus
from .facts import Device, Refused

FILTERS = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def visible(node: Node, devices: Sequence[Device], *, in_pod: bool) -> dict[str, str]:
    """The environment that shows a child these devices, numbered as HSA numbers its agents: in KFD's order, or in the
    node's where KFD was not read."""
    parts = [(part.kfd_node, card.index, part.index) for card in gpus(node) for part in card.partitions]
    if not devices or (in_pod and len(devices) == len(parts)):
        return {}
    if all(kfd is not None for kfd, _, _ in parts):
        parts.sort()
    number = {(card, partition): place for place, (_, card, partition) in enumerate(parts)}
    return {"ROCR_VISIBLE_DEVICES": ",".join(str(number[device.at]) for device in devices)}


def check_filters(environment: Mapping[str, str], *, in_pod: bool) -> tuple[str, ...]:
    """Notes on filters that are set already. Raises Refused outside a pod: they would number our devices anew."""
    found = [name for name in FILTERS if environment.get(name)]
    if not found:
        return ()
    if in_pod:
        return tuple(f"{name} is set: in a pod the device plugin hands out the devices, leave it out" for name in found)
    raise Refused(
        f"{found[0]}={environment[found[0]]} is set: it would number the devices anew behind the runtime's own choice",
        field=found[0],
        value=environment[found[0]],
        remedy="unset it and choose with --card, --partition_id and --partition_count",
    )
