"""The amdgpu driver's sysfs directory of each card: `/sys/bus/pci/drivers/amdgpu/<bdf>/`.

File names and contents: Linux Documentation/gpu/amdgpu (partition files, mem_info_vram_*), as read by
ROCm/k8s-device-plugin. A missing file means the card or the driver does not have it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

from aim_profile.errors import NodeError
from aim_profile.gpus.catalog import COMPUTE_MODES, MEMORY_MODES, Compute, Memory

from .bounded import read_bounded
from .facts import AllocMode

_Mode = TypeVar("_Mode", bound=str)
BDF = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_AMD = 0x1002
_MAX_FILE_BYTES = 4096
_MAX_VRAM_BYTES = 2**50
# A display controller (0x03xxxx) or a processing accelerator (0x12xxxx).
_GPU_CLASSES = (0x03, 0x12)
_OF_AMDGPU = ("mem_info_vram_total", "current_compute_partition")


class SysfsCard(NamedTuple):
    """One card's directory. compute/memory None: no partition file (not partitionable), or unreadable."""

    bdf: str
    device_id: int
    partitionable: bool
    compute: Compute | None
    memory: Memory | None
    compute_caps: tuple[Compute, ...]
    memory_caps: tuple[Memory, ...]
    alloc_mode: AllocMode | None
    numa_node: int | None
    vram_mib: int | None
    notes: tuple[str, ...]


def read_cards(folder: Path) -> tuple[SysfsCard, ...]:
    """Every AMD GPU among the `<bdf>/` directories of `folder`. Raises NodeError naming the file."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if BDF.fullmatch(entry.name))
    except OSError as problem:
        raise _bad(folder, str(problem)) from problem
    return tuple(card for entry in entries if (card := _read_card(entry, entry.name)) is not None)


def holds_cards(folder: Path) -> bool:
    """Whether `folder` has `<bdf>/` directories."""
    return folder.is_dir() and any(BDF.fullmatch(entry.name) for entry in folder.iterdir())


def cards_elsewhere(roots: tuple[Path, ...]) -> tuple[SysfsCard, ...]:
    """Cards of a recording that holds them under bus/pci/devices or class/drm only.

    Other drivers' devices are there too: a card counts where amdgpu shows its memory or its mode.
    """
    places = ("bus/pci/devices/*", "class/drm/card*/device")
    folders: dict[str, Path] = {}
    for folder in sorted(folder for root in roots for place in places for folder in root.glob(place)):
        address = _address(folder)
        if address and any((folder / name).is_file() for name in _OF_AMDGPU):
            folders.setdefault(address, folder)
    found = (_read_card(folder, address) for address, folder in sorted(folders.items()))
    return tuple(card for card in found if card is not None)


def _address(folder: Path) -> str | None:
    """The PCI address of a device's directory: its name, that of what it links to, or what uevent says."""
    for name in (folder.name, folder.resolve().name):
        if BDF.fullmatch(name):
            return name
    said = re.search(rf"^PCI_SLOT_NAME=({BDF.pattern})$", _text(folder / "uevent") or "", re.MULTILINE)
    return said.group(1) if said else None


def _read_card(folder: Path, bdf: str) -> SysfsCard | None:
    vendor, kind = _hexadecimal(folder / "vendor"), _hexadecimal(folder / "class")
    if vendor not in (None, _AMD) or (kind is not None and kind >> 16 not in _GPU_CLASSES):
        return None
    device_id = _hexadecimal(folder / "device")
    if device_id is None:
        raise _bad(folder / "device", "missing or unreadable: the PCI device id is needed")
    notes: list[str] = []
    current = _text(folder / "current_compute_partition")
    available = _listed(folder / "available_compute_partition", COMPUTE_MODES)
    partitionable = current is not None or bool(available)
    return SysfsCard(
        bdf=bdf,
        device_id=device_id,
        partitionable=partitionable,
        compute=_mode(folder / "current_compute_partition", COMPUTE_MODES, notes),
        memory=_mode(folder / "current_memory_partition", MEMORY_MODES, notes),
        compute_caps=available,
        memory_caps=_listed(folder / "available_memory_partition", MEMORY_MODES),
        alloc_mode=_alloc_mode(folder / "compute_partition_mem_alloc_mode") if partitionable else None,
        numa_node=_numa_node(folder / "numa_node"),
        vram_mib=_vram_mib(folder / "mem_info_vram_total"),
        notes=tuple(notes),
    )


def _mode(file: Path, modes: tuple[_Mode, ...], notes: list[str]) -> _Mode | None:
    """The current mode; the driver's own `UNKNOWN` stays unknown, anything else is an error."""
    text = _text(file)
    if text is None:
        return None
    if text.upper() == "UNKNOWN":
        notes.append(f"{file.name}: the driver says UNKNOWN")
        return None
    found = next((mode for mode in modes if mode == text.upper()), None)
    if found is None:
        raise _bad(file, f"{text[:40]!r} is none of {', '.join(modes)}")
    return found


def _listed(file: Path, modes: tuple[_Mode, ...]) -> tuple[_Mode, ...]:
    text = _text(file)
    if text is None or text.upper() == "NOT SUPPORTED":
        return ()
    words = [word.strip().upper() for word in text.split(",") if word.strip()]
    known = tuple(mode for mode in modes if mode in words)
    if not known or len(known) != len(set(words)):
        raise _bad(file, f"{text[:80]!r} is not a list of {', '.join(modes)}")
    return known


def _alloc_mode(file: Path) -> AllocMode:
    """Drivers without the switch always cap."""
    text = _text(file)
    if text is None:
        return "CAPPING"
    found: AllocMode | None = next((mode for mode in get_args(AllocMode) if mode == text.upper()), None)
    if found is None:
        raise _bad(file, f"{text[:40]!r} is neither CAPPING nor ALL")
    return found


def _numa_node(file: Path) -> int | None:
    text = _text(file)
    if text is None or text == "-1":
        return None
    if not (text.isdecimal() and len(text) <= 6):
        raise _bad(file, f"{text[:40]!r} is not a NUMA node")
    return int(text)


def vram_use(folder: Path) -> tuple[int, int] | None:
    """Bytes used and bytes in all of one card (its `<bdf>/` directory): of the whole PCI device, never of a partition.

    None where a file is absent or unreadable. Raises NodeError naming the file where it holds no size.
    """
    used, total = _size_bytes(folder / "mem_info_vram_used"), _size_bytes(folder / "mem_info_vram_total")
    return None if used is None or not total else (used, total)


def _vram_mib(file: Path) -> int | None:
    size_bytes = _size_bytes(file)
    return None if size_bytes is None else size_bytes // 2**20


def _size_bytes(file: Path) -> int | None:
    text = _text(file)
    if text is None:
        return None
    if not (text.isdecimal() and len(text) <= 16 and int(text) <= _MAX_VRAM_BYTES):
        raise _bad(file, f"{text[:40]!r} is not a size in bytes")
    return int(text)


def _hexadecimal(file: Path) -> int | None:
    text = _text(file)
    if text is None:
        return None
    if not re.fullmatch(r"0x[0-9a-fA-F]{1,8}", text):
        raise _bad(file, f"{text[:40]!r} is not a hexadecimal id")
    return int(text, 16)


def _text(file: Path) -> str | None:
    """The file's single value; None where it is absent, refused, or the driver answers an error."""
    raw = read_bounded(file, _MAX_FILE_BYTES)
    if raw is None:
        return None
    if len(raw) > _MAX_FILE_BYTES or not raw.isascii() or b"\0" in raw:
        raise _bad(file, "not a sysfs value: too large, or not plain text")
    text = raw.decode("ascii").strip()
    if not text:
        raise _bad(file, "truncated: the file is empty")
    return text


def _bad(file: Path, problem: str) -> NodeError:
    return NodeError(f"{file}: {problem}", field=str(file), remedy="record the tree again, or leave the card out")
