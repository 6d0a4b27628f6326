"""The kernel's files about a node's GPUs, copied as they are into a folder that `aim-profile node --root` reads back.

Only the files that are read, by their names. A card's unique id and its hive's are serial numbers: each becomes a small
number, the same wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from aim_profile.nodes.bounded import read_bounded

_NODES = Path("class/kfd/kfd/topology/nodes")
_CARDS = Path("bus/pci/drivers/amdgpu")
_OF_A_NODE = ("gpu_id", "properties", "mem_banks/*/properties", "io_links/*/properties")
_OF_A_CARD = (
    *("vendor", "class", "device", "numa_node", "mem_info_vram_total", "current_compute_partition"),
    *("available_compute_partition", "current_memory_partition", "available_memory_partition"),
    "compute_partition_mem_alloc_mode",
)
_BDF = "[0-9a-f]*:[0-9a-f][0-9a-f]:[0-9a-f][0-9a-f].[0-7]"
_SERIAL = re.compile(r"^(unique_id|hive_id) ([1-9]\d*)$", re.MULTILINE)
_MOST_BYTES = 65_536
_MOST_FILES = 20_000


def dump(sys: Path, folder: Path) -> int:
    """Copy what is below `sys` (/sys of a node) to the same places below `folder`; how many files there were."""
    serials: dict[str, int] = {}
    number = 0
    for number, file in enumerate(_files(sys), 1):
        if number > _MOST_FILES:
            break
        raw = read_bounded(file, _MOST_BYTES)
        if raw is None or len(raw) > _MOST_BYTES:
            continue
        place = folder / file.relative_to(sys)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(_without_serials(raw.decode("ascii", "replace"), serials), encoding="ascii", errors="replace")
    return number


def _files(sys: Path) -> Iterator[Path]:
    nodes, cards = sys / _NODES, sys / _CARDS
    for pattern in _OF_A_NODE:
        yield from sorted(nodes.glob(f"[0-9]*/{pattern}"))
    for name in _OF_A_CARD:
        yield from sorted(cards.glob(f"{_BDF}/{name}"))


def _without_serials(text: str, serials: dict[str, int]) -> str:
    return _SERIAL.sub(lambda found: f"{found[1]} {serials.setdefault(found[2], len(serials) + 1)}", text)
