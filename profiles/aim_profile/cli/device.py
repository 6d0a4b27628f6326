"""Which device an option means: a mode of a catalogue GPU, an amount of memory, or a card of a node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aim_profile.errors import AimProfileError, NodeError
from aim_profile.gpus.catalog import Deployment, PartitionMode, by_name
from aim_profile.nodes.devices import mode_of
from aim_profile.nodes.read import Card, Node, load_emulated, read_node
from aim_profile.units import parse_memory

from .options import refuse_beside


def find_node(root: Path | None, amd_smi: Sequence[Path], emulated: Path | None) -> Node:
    """The node that the options name. Raises NodeError."""
    if emulated is not None and (root is not None or amd_smi):
        raise NodeError(
            "--node and --root/--amd-smi name two nodes", field="node", value=str(emulated), remedy="give one of them"
        )
    return load_emulated(emulated) if emulated is not None else read_node(root, amd_smi)


class NamedDevice(NamedTuple):
    """What `fit` sizes on: a mode of a GPU, or (mode None) any device of that many bytes; cores: of a CPU set."""

    mode: PartitionMode | None
    memory_bytes: int
    cores: int | None = None


def device(
    gpu: str | None,
    partition: str | None,
    memory: str | None,
    deployment: Deployment,
    at: tuple[Path | None, Path | None, int | None],
) -> NamedDevice:
    """The device that the options name, else a card's of the node `at` (root, emulation file, card).

    Raises AimProfileError for options that contradict one another, or that name nothing.
    """
    if memory is not None and (gpu is not None or partition is not None):
        raise AimProfileError(
            "--memory and --gpu both say what the device is", field="memory", value=memory, remedy="give one of them"
        )
    if memory is not None or gpu is not None:
        which = dict(zip(("root", "node", "card"), at, strict=True))
        refuse_beside("--memory" if gpu is None else f"--gpu {gpu}", which)
    if memory is not None:
        return NamedDevice(None, parse_memory(memory))
    if gpu is not None:
        mode = by_name(gpu).mode(partition or "SPX", deployment)
    elif partition is not None:
        raise AimProfileError(
            "--partition without --gpu", field="gpu", value=partition, remedy="name the GPU too, as in --gpu MI300X"
        )
    else:
        return _device_of(card_of(find_node(at[0], (), at[1]), at[2]), deployment)
    return NamedDevice(mode, mode.memory_bytes)


def _device_of(card: Card, deployment: Deployment) -> NamedDevice:
    """The card's smallest device: by its mode, or where that is not wholly readable by what it reports."""
    if card.is_cpu and not card.partitions:
        raise NodeError(f"card {card.index} has no CPU set", field="partitions", remedy="name its partitions")
    if card.is_cpu:
        least = min(card.partitions, key=lambda part: part.memory_mib or 0)
        return NamedDevice(None, least.memory_bytes or 0, least.compute_units or 0)
    sizes = [part.memory_bytes for part in card.partitions if part.memory_bytes]
    if card.accelerator and card.partitionable and card.mode_label is None and sizes:
        return NamedDevice(None, min(sizes))
    mode = mode_of(card, deployment)
    return NamedDevice(mode, mode.memory_bytes)


def card_of(found: Node, index: int | None) -> Card:
    """The node's card of that index, the first where None. Raises NodeError."""
    if not found.cards:
        raise NodeError("no AMD GPU here", field="node", remedy="give --gpu, or --root or --node")
    wanted = found.cards[0].index if index is None else index
    card = next((card for card in found.cards if card.index == wanted), None)
    if card is None:
        known = f"the node has {len(found.cards)}: 0 to {len(found.cards) - 1}"
        raise NodeError(f"no card {index}", field="card", value=index, remedy=known)
    return card
