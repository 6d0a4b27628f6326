"""KFD's topology: `/sys/class/kfd/kfd/topology/nodes/<n>/` as GPU nodes.

Files are `key value` lines (Linux drivers/gpu/drm/amd/amdkfd/kfd_topology.c). Reading needs no root; in a
container KFD answers only for the devices it was given.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from aim_profile.errors import NodeError

_MAX_FILE_BYTES = 65_536
_LOCAL_MEMORY_HEAPS = (1, 2)  # frame buffer, visible or not (kfd_crat.h)
_REQUIRED = ("simd_count", "simd_per_cu", "vendor_id", "device_id", "location_id", "drm_render_minor")


class KfdNode(NamedTuple):
    """One GPU node: a whole GPU, or one partition of it. memory_mib None: banks not recorded."""

    number: int
    device_id: int
    gfx: str | None
    compute_units: int
    xcds: int | None
    location_id: int
    domain: int
    render_minor: int
    hive_id: int | None
    unique_id: int | None
    memory_mib: int | None
    numa_node: int | None

    @property
    def slot(self) -> tuple[int, int, int]:
        """Groups the partitions of a card: its unique id, PCI domain, bus and device."""
        return (self.unique_id or 0, self.domain, (self.location_id & 0xFFFF) >> 3)

    @property
    def bdf(self) -> str:
        """The card's PCI address, function 0."""
        bus, device = (self.location_id >> 8) & 0xFF, (self.location_id >> 3) & 0x1F
        return f"{self.domain:04x}:{bus:02x}:{device:02x}.0"

    @property
    def partition_index(self) -> int:
        """The partition's number: bits 31:28 of the location, or the PCI function."""
        return (self.location_id >> 28) & 0xF or self.location_id & 0x7


class Topology(NamedTuple):
    """GPU nodes in KFD's order; hidden: nodes whose files are there but not for us to read."""

    gpus: tuple[KfdNode, ...]
    hidden: int


def read_topology(nodes: Path) -> Topology:
    """All GPU nodes under a `nodes/` directory. Raises NodeError naming the file and what is wrong."""
    numbered = sorted((int(entry.name), entry) for entry in _entries(nodes) if entry.name.isdecimal())
    if not numbered:
        raise _bad(nodes, "holds no numbered KFD nodes")
    properties = {number: _properties(folder) for number, folder in numbered}
    hidden = sum(1 for read in properties.values() if read is None)
    processors = {number for number, read in properties.items() if read and read.get("simd_count") == 0}
    gpus = tuple(
        _gpu_node(number, folder, read, processors)
        for number, folder in numbered
        if (read := properties[number]) is not None and number not in processors
    )
    return Topology(gpus, hidden)


def _gpu_node(number: int, folder: Path, found: dict[str, int], processors: set[int]) -> KfdNode:
    file = folder / "properties"
    absent = [key for key in _REQUIRED if key not in found]
    if absent:
        raise _bad(file, f"truncated: no {', '.join(absent)}")
    if not found["simd_per_cu"] or found["simd_count"] % found["simd_per_cu"]:
        raise _bad(file, f"{found['simd_count']} SIMDs at {found['simd_per_cu']} per compute unit")
    major, minor, step = gfx_parts(found.get("gfx_target_version", 0))
    if major == 9 and minor >= 4 and not found.get("num_xcc"):
        raise _bad(file, "truncated: no num_xcc, which every driver of this GPU writes")
    return KfdNode(
        number=number,
        device_id=found["device_id"] if found["vendor_id"] == 0x1002 else 0,
        gfx=f"gfx{major}{minor:x}{step:x}" if major else None,
        compute_units=found["simd_count"] // found["simd_per_cu"],
        xcds=found.get("num_xcc") or None,
        location_id=found["location_id"],
        domain=found.get("domain", 0),
        render_minor=found["drm_render_minor"],
        hive_id=found.get("hive_id") or None,
        unique_id=found.get("unique_id") or None,
        memory_mib=_memory_mib(folder),
        numa_node=_numa_node(folder, processors),
    )


def gfx_parts(version: int) -> tuple[int, int, int]:
    """gfx_target_version 90402 → (9, 4, 2), written gfx942; (0, 0, 0) where the driver gives none."""
    return version // 10000, version // 100 % 100, version % 100


def _properties(folder: Path) -> dict[str, int] | None:
    """The node's properties; None where KFD refuses them to us, or a recording kept the refusal."""
    file = folder / "properties"
    try:
        text = _read(file)
    except PermissionError:
        return None
    gpu_id = folder / "gpu_id"
    if not text.strip() and gpu_id.is_file() and not gpu_id.read_bytes().strip():
        return None
    found = _key_values(file, text)
    if "simd_count" not in found:
        raise _bad(file, "truncated: no simd_count")
    return found


def _key_values(file: Path, text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        if not key:
            continue
        if not (value.isascii() and value.isdecimal()) or len(value) > 20 or int(value) >= 2**64:
            raise _bad(file, f"line {line.strip()[:80]!r} is not `key number`")
        found[key] = int(value)
    return found


def _memory_mib(folder: Path) -> int | None:
    """Local memory of the node, all its banks together; None where none is recorded or readable."""
    total = 0
    for bank in sorted(_entries(folder / "mem_banks")) if (folder / "mem_banks").is_dir() else []:
        file = bank / "properties"
        try:
            found = _key_values(file, _read(file))
        except PermissionError:
            return None
        if "size_in_bytes" not in found or "heap_type" not in found:
            raise _bad(file, "truncated: no heap_type or size_in_bytes")
        if found["heap_type"] in _LOCAL_MEMORY_HEAPS:
            total += found["size_in_bytes"]
    return total // 2**20 or None


def _numa_node(folder: Path, processors: set[int]) -> int | None:
    """The CPU node that an io_link leads to: KFD numbers CPU nodes as the kernel numbers NUMA nodes."""
    links = folder / "io_links"
    for link in sorted(_entries(links)) if links.is_dir() else []:
        try:
            to = _key_values(link / "properties", _read(link / "properties")).get("node_to")
        except PermissionError:
            continue
        if to in processors:
            return to
    return None


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as problem:
        raise _bad(folder, str(problem)) from problem


def _read(file: Path) -> str:
    """The file's text. PermissionError passes through (KFD refuses what is not ours)."""
    try:
        with file.open("rb") as opened:
            raw = opened.read(_MAX_FILE_BYTES + 1)
    except PermissionError:
        raise
    except (OSError, ValueError) as problem:
        raise _bad(file, str(problem)) from problem
    if len(raw) > _MAX_FILE_BYTES or not raw.isascii() or b"\0" in raw:
        raise _bad(file, "not a KFD properties file: too large, or not plain text")
    return raw.decode("ascii")


def _bad(file: Path, problem: str) -> NodeError:
    return NodeError(f"{file}: {problem}", field=str(file), remedy="record the tree again, or leave the node out")
