"""Is the driver there, does it have the GPUs, and are its version and ROCm's new enough for what the cards do?

What a partitioned card needs (ROCm >= 6.4, amdgpu >= 6.12.12) is AMD's partitioning guide for MI300X; that ROCm 7.0.1
miscounts CPX under device plugins before 1.31.0.9 is one report. Nothing else is held against versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from aim_profile.gpus.catalog import Accelerator, by_pci_id
from aim_profile.nodes.bounded import read_bounded
from aim_profile.nodes.facts import Card

from .finding import Finding, error, ok, unknown, warning
from .system import System

_MODULE = "sys/module/amdgpu"
_PCI_DEVICES = "sys/bus/pci/devices"
_DRIVER = "sys/bus/pci/drivers/amdgpu"
_ROCM = "opt/rocm/.info/version"
_KERNEL = "proc/sys/kernel/osrelease"
_AMD = "0x1002"
_LEAST = {"amdgpu": (6, 12, 12), "ROCm": (6, 4)}
_MISCOUNTS_CPX = (7, 0, 1)
#: The first device plugin that counts CPX right under that ROCm.
FIXED_PLUGIN = "1.31.0.9"
Version = tuple[int, ...]


def driver(system: System) -> Iterator[Finding]:
    """Is amdgpu loaded, and has it every AMD GPU of the PCI bus?"""
    if system.root is None:
        yield unknown("driver", "no files of the node were given", "--root", "run it on the node, or record its tree")
        return
    loaded = system.has(_MODULE) or system.has(_DRIVER)
    unbound = _unbound(system)
    for address, pci_id, bound in unbound or ():
        yield error(
            "driver",
            f"the GPU {pci_id} at {address} is bound to {bound or 'no driver'}, not to amdgpu",
            f"/{_PCI_DEVICES}/{address}/driver",
            "a GPU given to vfio is the virtual machine's: run this there; else `modprobe amdgpu` and read `dmesg`",
        )
    if loaded:
        state = system.text(f"{_MODULE}/initstate")
        yield (
            ok("driver", "amdgpu is loaded", f"/{_MODULE if system.has(_MODULE) else _DRIVER}")
            if state in (None, "live")
            else error("driver", "amdgpu is loaded but not live", f"/{_MODULE}/initstate", "read `dmesg | grep amdgpu`")
        )
    elif not system.has("sys/module"):
        yield unknown("driver", "the tree has no sys/module", "/sys/module", "record /sys/module/amdgpu as well")
    elif not unbound:
        yield warning(
            "driver",
            "amdgpu is not loaded" + (", and no AMD GPU is on the PCI bus" if unbound is not None else ""),
            f"/{_MODULE}",
            "on a machine that has an AMD GPU: `modprobe amdgpu`, then read `dmesg | grep amdgpu`",
        )


def _unbound(system: System) -> list[tuple[str, str, str | None]] | None:
    """AMD's known GPUs on the PCI bus that are not amdgpu's: address, id, driver; None where the bus is not there."""
    try:
        devices = sorted((system.path(_PCI_DEVICES) or Path("absent")).iterdir())
    except OSError:
        return None
    found = []
    for device in devices:
        name = f"{_PCI_DEVICES}/{device.name}"
        pci_id = system.text(f"{name}/device") or ""
        if system.text(f"{name}/vendor") != _AMD or not _known(pci_id) or system.has(f"{_DRIVER}/{device.name}"):
            continue
        bound = _bound(device)
        # A recording may lack the link, so that no driver there means nothing.
        if bound != "amdgpu" and (bound or system.live):
            found.append((device.name, pci_id, bound))
    return found


def _known(pci_id: str) -> bool:
    return bool(re.fullmatch(r"0x[0-9a-f]{4}", pci_id)) and isinstance(by_pci_id(int(pci_id, 16)), Accelerator)


def _bound(device: Path) -> str | None:
    """The driver of a device: what its link names, or uevent in a recording that kept no links."""
    if (link := device / "driver").is_symlink():
        return link.readlink().name
    uevent = read_bounded(device / "uevent", 4096) or b""
    said = re.search(r"^DRIVER=([\w-]{1,40})$", uevent.decode("utf-8", "replace"), re.MULTILINE)
    return said[1] if said else None


def versions(system: System) -> dict[str, str | None]:
    """Of the kernel, amdgpu and ROCm: numbers only; None: not readable here."""
    return {
        name: None if (text := system.text(file)) is None else _numbers(text)
        for name, file in (("kernel", _KERNEL), ("amdgpu", f"{_MODULE}/version"), ("ROCm", _ROCM))
    }


def compatibility(system: System, cards: tuple[Card, ...]) -> Iterator[Finding]:
    """Each version, held against what the cards' modes need."""
    found = versions(system)
    files = {"kernel": _KERNEL, "amdgpu": f"{_MODULE}/version", "ROCm": _ROCM}
    partitioned = any(len(card.partitions) > 1 for card in cards)
    for name, text in found.items():
        where = f"/{files[name]}"
        if text is None:
            yield unknown("versions", f"the version of {name} is not readable", where, _HOW[name])
        elif partitioned and name in _LEAST and _parts(text) < _LEAST[name]:
            least = ".".join(map(str, _LEAST[name]))
            seen = f"{name} {text}, and the cards are partitioned: AMD asks for {least} or newer"
            yield error("versions", seen, where, f"update {name} to {least} or newer, or set the cards to SPX/NPS1")
        else:
            yield ok("versions", f"{name} {text}", where)
    cpx = any(card.compute_partition == "CPX" for card in cards)
    if cpx and found["ROCm"] and _parts(found["ROCm"])[:3] == _MISCOUNTS_CPX:
        yield warning(
            "versions",
            f"ROCm 7.0.1 with cards in CPX was reported to make device plugins before {FIXED_PLUGIN} miscount",
            f"/{_ROCM}",
            f"use device plugin {FIXED_PLUGIN} or newer, and compare allocatable (--kube-node)",
        )


_HOW = {
    "kernel": "record /proc/sys/kernel/osrelease as well",
    "amdgpu": "the kernel's own amdgpu has no version; `modinfo amdgpu` tells that of AMD's packages",
    "ROCm": "read it where ROCm is installed: /opt/rocm/.info/version of the node or the image",
}


def _numbers(text: str) -> str | None:
    """`6.8.0` of `6.8.0-45-of-whom`: what stands behind may be anybody's."""
    found = re.match(r"\d{1,5}(?:\.\d{1,6}){1,4}", text)
    return found[0] if found else None


def _parts(text: str) -> Version:
    return tuple(map(int, text.split(".")))
