"""What each witness of a node says on its own, before they are joined: KFD, sysfs and amd-smi."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aim_profile.errors import NodeError

from .amdsmi import ask_amdsmi, read_amd_smi_files
from .cards import card_from_sysfs
from .facts import Card
from .kfd import read_topology
from .read import kfd_cards, places
from .sysfs import cards_elsewhere, read_cards


class Testimony(NamedTuple):
    """One witness. cards None: it is not here, or what it says cannot be understood (`problem`).

    where: the directory or command; hidden: KFD nodes that are refused to this process, as in a container.
    """

    witness: str
    where: str
    cards: tuple[Card, ...] | None
    problem: NodeError | None = None
    hidden: int = 0


def read_witnesses(root: Path | None, amd_smi_files: Sequence[Path] = ()) -> tuple[Testimony, ...]:
    """KFD's, sysfs's and amd-smi's, of / when root is None. amd-smi is asked on the live node only; saved output
    speaks for any, and without a root it is the only one. Nothing raises: what is wrong stands in the testimony."""
    if root is None and amd_smi_files:
        return (_amd_smi(amd_smi_files, live=False),)
    tree = root or Path("/")
    kfd, pci = places(tree)
    return (
        _kfd(kfd),
        _sysfs(tree, pci),
        _amd_smi(amd_smi_files, live=root is None),
    )


def _kfd(nodes: Path | None) -> Testimony:
    if nodes is None:
        return Testimony("KFD", "/sys/class/kfd/kfd/topology/nodes", None)
    try:
        topology = read_topology(nodes)
    except NodeError as problem:
        return Testimony("KFD", str(nodes), None, problem)
    return Testimony("KFD", str(nodes), kfd_cards(topology), hidden=topology.hidden)


def _sysfs(tree: Path, pci: Path | None) -> Testimony:
    where = str(pci or tree)
    try:
        found = read_cards(pci) if pci else cards_elsewhere((tree / "sys", tree))
    except NodeError as problem:
        return Testimony("sysfs", where, None, problem)
    cards = tuple(card_from_sysfs(index, card) for index, card in enumerate(found))
    return Testimony("sysfs", where, cards if pci or cards else None)


def _amd_smi(files: Sequence[Path], live: bool) -> Testimony:
    where = ", ".join(map(str, files)) or "amd-smi"
    try:
        cards = read_amd_smi_files(files) if files else ask_amdsmi()[1] if live else ()
    except NodeError as problem:
        return Testimony("amd-smi", where, None, problem)
    return Testimony("amd-smi", where, cards or None)
