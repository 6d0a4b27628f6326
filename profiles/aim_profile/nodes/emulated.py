"""Emulation files: a node as YAML, read back exactly as it was written, or drawn up without hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from aim_profile.errors import AimProfileError, NodeError
from aim_profile.gpus.catalog import Deployment, by_name

from .facts import Card, Node, Partition

_VERSION = 1
_MAX_FILE_BYTES = 64 * 2**20
_SHORT_FORM = {"version", "name", "gpu", "cards", "partition", "deployment"}


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

    Raises NodeError naming the file, the field and the remedy.
    """
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise _bad(file, "larger than any emulation file")
        return parse_emulated(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as problem:
        raise _bad(file, str(problem)) from problem


def parse_emulated(text: str, named: str = "node") -> Node:
    """The same from text; `named` stands in errors for the file."""
    try:
        raw: Any = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise _bad(named, f"not YAML: {problem}") from problem
    if not isinstance(raw, dict) or raw.get("version") != _VERSION:
        raise _bad(named, f"must be a mapping with version: {_VERSION}")
    if "node" not in raw:
        return _short(raw, named)
    if set(raw) != {"version", "node"}:
        raise _bad(named, f"unknown keys: {', '.join(sorted(map(str, set(raw) - {'version', 'node'})))}")
    try:
        return Node.model_validate(raw["node"])
    except (ValidationError, RecursionError) as problem:
        raise _bad(named, _first_error(problem)) from problem


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


def _short(raw: dict[str, Any], named: str) -> Node:
    if unknown := sorted(map(str, set(raw) - _SHORT_FORM)):
        raise _bad(named, f"unknown keys: {', '.join(unknown)}")
    cards = raw.get("cards", 8)
    if not isinstance(cards, int) or isinstance(cards, bool) or not 1 <= cards <= 64:
        raise _bad(named, f"cards is {cards!r}, not a number from 1 to 64")
    deployment = raw.get("deployment", "bare-metal")
    if deployment not in ("bare-metal", "passthrough", "sr-iov"):
        raise _bad(named, f"deployment {deployment!r} is none of bare-metal, passthrough, sr-iov")
    try:
        return emulate(
            str(raw.get("gpu")), cards, str(raw.get("partition", "SPX/NPS1")), deployment, str(raw.get("name", "node"))
        )
    except AimProfileError as problem:
        raise _bad(named, str(problem)) from problem


def _first_error(problem: Exception) -> str:
    if not isinstance(problem, ValidationError):
        return str(problem)
    first = problem.errors(include_url=False)[0]
    return f"node.{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r:.80})"


def _bad(file: object, problem: str) -> NodeError:
    return NodeError(f"{file}: {problem}", field=str(file), remedy="`aim-profile node export` writes such a file")
