"""What is here: the node's cards and partitions, read and never changed.

Backends, first that finds cards wins: sysfs and KFD (no root, no library) → the amdsmi library →
`amd-smi --json` → an emulation file. Saved amd-smi output fills what sysfs and KFD leave open. A machine without an
AMD GPU has one card that stands for its processors, from /proc.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

from aim_profile.errors import NodeError
from aim_profile.gpus.catalog import Deployment, Unknown, by_pci_id

from .amdsmi import ask_amdsmi, read_amd_smi_files
from .cards import card_from_kfd, card_from_sysfs, merge_cards
from .cpu import read_cpu
from .emulated import emulate, export_node, load_emulated
from .facts import Backend, Card, DriverCaps, Node, Partition
from .kfd import KfdNode, Topology, read_topology
from .sysfs import SysfsCard, cards_elsewhere, holds_cards, read_cards

__all__ = [
    "Card",
    "DriverCaps",
    "Node",
    "Partition",
    "emulate",
    "export_node",
    "load_emulated",
    "read_node",
]

_KFD = ("class/kfd/kfd/topology/nodes", "devices/virtual/kfd/kfd/topology/nodes")
_PCI = ("bus/pci/drivers/amdgpu", "module/amdgpu/drivers/pci:amdgpu")
_SYSTEM_FOLDERS = ("sys", "class", "bus", "module", "devices")
_LIVE = Path("/")


def read_node(root: Path | None = None, amd_smi_files: Sequence[Path] = ()) -> Node:
    """The node at `root`: / when None, else a recorded tree.

    A recorded tree is a mirror of / or /sys, a folder that holds KFD's `nodes/`, or one of `<bdf>/`
    directories. amd_smi_files: saved `amd-smi ... --json` output, alone or to complete the tree.
    Raises NodeError naming the file and what is wrong. A machine without an AMD GPU is a Node whose one
    card is its processors (Card.is_cpu), without cards where /proc is not there to say what they are.
    Nothing is written and no setting changes.
    """
    said: list[str] = []
    saved = read_amd_smi_files(amd_smi_files, said) if amd_smi_files else ()
    if root is None and saved:
        return _node(None, saved, "amd-smi", tuple(said))
    node = _from_tree(root or _LIVE)
    if root is None and not node.cards:
        backend, found = ask_amdsmi(said)
        node = _node(_LIVE, found, backend, node.notes) if found else node
    node = node.model_copy(update={"cards": merge_cards(node.cards, saved), "notes": (*node.notes, *said)})
    return node if node.cards else _with_cpu(node, root or _LIVE)


def _with_cpu(node: Node, root: Path) -> Node:
    """The node without a GPU: its processors, where /proc is there to say what they are."""
    card = read_cpu(root)
    return node if card is None else node.model_copy(update={"cards": (card,), "backend": "proc"})


class Places(NamedTuple):
    """Where a tree has KFD's `nodes/` and the driver's `<bdf>/` directories; None: it has none."""

    kfd: Path | None
    pci: Path | None


def places(root: Path) -> Places:
    """Those of a live or recorded tree."""
    return Places(_find(root, _KFD, _nodes_folder(root)), _find(root, _PCI, root if holds_cards(root) else None))


def kfd_cards(topology: Topology) -> tuple[Card, ...]:
    """The cards as KFD alone tells of them: their memory mode is not known."""
    return tuple(card_from_kfd(index, group, None) for index, group in enumerate(_by_card(topology)))


def _by_card(topology: Topology) -> list[list[KfdNode]]:
    ordered = sorted(topology.gpus, key=lambda node: (node.slot[1:], node.slot[0], node.number))
    return [list(group) for _, group in groupby(ordered, key=lambda node: node.slot)]


def _from_tree(root: Path) -> Node:
    kfd, pci = places(root)
    in_sysfs = read_cards(pci) if pci else cards_elsewhere((root / "sys", root))
    if kfd is None and pci is None and not in_sysfs:
        return _without_gpu(root)
    topology = read_topology(kfd) if kfd else Topology((), 0)
    cards, notes = _cards(topology, in_sysfs, kfd is not None)
    backend: Backend = "kfd" if not (pci or in_sysfs) else "sysfs+kfd" if kfd else "sysfs"
    return _node(root, cards, backend, notes)


def _find(root: Path, places: tuple[str, ...], otherwise: Path | None) -> Path | None:
    """The first place that exists under root or root/sys."""
    candidates = [base / place for base in (root / "sys", root) for place in places]
    return next((found for found in candidates if found.is_dir()), otherwise)


def _nodes_folder(root: Path) -> Path | None:
    for above in ("nodes", "topology/nodes", "kfd/topology/nodes", "kfd/kfd/topology/nodes"):
        if (root / above).is_dir():
            return root / above
    return root if root.name == "nodes" and root.is_dir() else None


def _without_gpu(root: Path) -> Node:
    if root.is_file():
        raise NodeError(
            f"{root}: a file, not a directory",
            field="root",
            value=str(root),
            remedy="give the directory that a tree was recorded into; --amd-smi and --node take files",
        )
    if not root.is_dir():
        raise NodeError(f"{root}: no such directory", field="root", value=str(root))
    if not any((root / name).is_dir() for name in _SYSTEM_FOLDERS):
        raise NodeError(
            f"{root}: holds neither KFD's nodes/ nor amdgpu's <bdf>/ directories",
            field="root",
            value=str(root),
            remedy="give a mirror of / or /sys, a folder that holds nodes/, or one that holds <bdf>/ directories",
        )
    return _node(root, (), "none", ("no AMD GPU: neither the amdgpu driver nor KFD is here",))


def _cards(
    topology: Topology, in_sysfs: tuple[SysfsCard, ...], has_kfd: bool
) -> tuple[tuple[Card, ...], tuple[str, ...]]:
    """KFD decides which cards are ours; sysfs alone counts where there is no KFD at all."""
    by_bdf = {card.bdf: card for card in in_sysfs}
    if not has_kfd:
        return tuple(card_from_sysfs(index, card) for index, card in enumerate(in_sysfs)), ()
    groups = _by_card(topology)
    cards = [card_from_kfd(index, group, by_bdf.pop(group[0].bdf, None)) for index, group in enumerate(groups)]
    return tuple(cards), _hidden_notes(topology, groups, by_bdf)


def _hidden_notes(topology: Topology, groups: list[list[KfdNode]], left: dict[str, SysfsCard]) -> tuple[str, ...]:
    notes = []
    if topology.hidden:
        notes.append(f"{topology.hidden} KFD nodes are not readable from here: not this container's devices")
    if left:
        notes.append(f"{len(left)} cards in sysfs are not in KFD's topology and not ours: {', '.join(left)}")
    if not groups:
        notes.append("KFD lists no GPU that this process may use")
    return tuple(notes)


def _node(root: Path | None, cards: tuple[Card, ...], backend: Backend, notes: tuple[str, ...]) -> Node:
    return Node(
        name=_host_name(root),
        deployment=_deployment(root, cards),
        backend=backend,
        cards=cards,
        notes=notes,
    )


def _host_name(root: Path | None) -> str | None:
    if root == _LIVE:
        return platform.node() or None
    text = _small_text(root / "etc/hostname") if root else None
    return text.strip()[:253] or None if text else None


def _deployment(root: Path | None, cards: tuple[Card, ...]) -> Deployment | Literal["unknown"]:
    """Virtual functions mean SR-IOV; else the processor's hypervisor flag tells a VM from bare metal."""
    functions = {function for card in cards if (function := _function(card)) is not None}
    if functions == {"vf"}:
        return "sr-iov"
    text = _small_text(root / "proc/cpuinfo") if root else None
    flags = next((line for line in (text or "").splitlines() if line.startswith("flags")), None)
    if flags is None or functions != {"pf"}:
        return "unknown"
    return "passthrough" if "hypervisor" in flags.split() else "bare-metal"


def _function(card: Card) -> str | None:
    if card.pci_id is None:
        return None
    found = by_pci_id(int(card.pci_id, 16))
    return None if isinstance(found, Unknown) else found.function_of(int(card.pci_id, 16))


def _small_text(file: Path) -> str | None:
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            return opened.read(65_536)
    except OSError:
        return None
