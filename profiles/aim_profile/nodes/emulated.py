"""Emulation files: a node as YAML, read back exactly as it was written, or drawn up without hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from aim_profile.errors import AimProfileError, NodeError
from aim_profile.files.read import Parsed, check, check_kind, located, parsed, read_parsed
from aim_profile.gpus.catalog import Deployment, by_name

from .emulated_cpu import cpu_node_of
from .facts import Card, Node, Partition

_VERSION: Literal[1] = 1


class _Exported(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    node: Node


class _Short(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    name: str = "node"
    gpu: str
    cards: Annotated[int, Field(strict=True, ge=1, le=64)] = 8
    partition: str = "SPX/NPS1"
    deployment: Deployment = "bare-metal"


def export_node(node: Node) -> str:
    """The node as an emulation file; `load_emulated` gives back an equal Node."""
    facts = node.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    body = {"version": _VERSION, "node": {**facts, "backend": node.backend}}
    return "# An emulated node for aim-profile: what was read, as it was read.\n" + yaml.safe_dump(
        body, sort_keys=False, width=110, allow_unicode=True
    )


def load_emulated(file: Path) -> Node:
    """A node from an emulation file: the exported form (`node:`), or the short one:

        version: 1
        name: node-1
        gpu: MI300X
        cards: 8
        partition: CPX/NPS4
        deployment: bare-metal

    A machine without a GPU says `kind: cpu` instead (emulated_cpu.py).
    Raises NodeError naming the file, the field and the remedy.
    """
    return node_of(read_parsed(file, NodeError))


def parse_emulated(text: str, named: str = "node") -> Node:
    """The same from text; `named` stands in errors for the file."""
    return node_of(parsed(text, named, NodeError))


def node_of(file: Parsed) -> Node:
    """The same from a file that was parsed to see what it is."""
    named, text, raw = file
    check_kind(raw, "emulation file", named, NodeError)
    if "node" in raw:
        return check(_Exported, raw, named, NodeError, text).node
    if "kind" in raw or "partitions" in raw:
        return cpu_node_of(file)
    short = check(_Short, raw, named, NodeError, text)
    try:
        return emulate(short.gpu, short.cards, short.partition, short.deployment, short.name)
    except AimProfileError as problem:
        at_line = located(named, text, (problem.field,))
        raise NodeError(
            f"{at_line}: {problem.field}: {problem.problem}",
            field=problem.field,
            value=problem.value,
            remedy=problem.remedy,
        ) from problem


def emulate(
    gpu: str, cards: int = 8, partition: str = "SPX/NPS1", deployment: Deployment = "bare-metal", name: str = "node"
) -> Node:
    """A node nobody read: `cards` equal cards of a catalogue GPU in one partition mode.

    Raises GpuError for an unknown GPU, PartitionError for a mode it cannot have.
    """
    accelerator = by_name(gpu)
    mode = accelerator.mode(partition, deployment)
    partitions = tuple(
        Partition(
            index=place,
            compute_units=mode.cus,
            memory_mib=mode.memory_mib,
            memory_source="derived",
            xcds=mode.xcds,
            render_minor=None,
        )
        for place in range(mode.partitions)
    )
    built = tuple(
        Card(
            index=index,
            bdf=f"0000:{index + 1:02x}:00.0",
            pci_id=f"{accelerator.pci_ids[0].id:#06x}",
            product=accelerator.name,
            gfx=accelerator.gfx,
            partitionable=accelerator.partitionable,
            compute_partition=mode.compute if accelerator.partitionable else None,
            memory_partition=mode.memory if accelerator.partitionable else None,
            alloc_mode="CAPPING" if accelerator.partitionable else None,
            vram_mib=accelerator.hbm_mib,
            partitions=partitions,
        )
        for index in range(cards)
    )
    return Node(name=name, deployment=deployment, backend="emulated", cards=built)
