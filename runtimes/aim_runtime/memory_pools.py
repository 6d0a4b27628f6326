"""Memory that can run out, and where its use is read: a card, a CPU partition, the container, the machine.

A card's use is the whole PCI device's: no file tells one partition's (the per-node figures of KFD repeat the card's on
all of its partitions), so that every partition of a card meets the same limit. Files are read anew each time, at most
4 KiB of each; where one is missing the answer is None, unknown.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aim_profile.nodes.cpu import memory_limit_file
from aim_profile.nodes.facts import Node
from aim_profile.nodes.sysfs import vram_use
from aim_profile.units import GIB

Scope = Literal["card", "partition", "cgroup", "machine"]
_MOST_BYTES = 4096
_MOST_PROCESSES = 256
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PCI_FOLDERS = ("bus/pci/drivers/amdgpu", "bus/pci/devices", "module/amdgpu/drivers/pci:amdgpu")


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes in use, of so many."""

    used: int
    total: int

    @property
    def share(self) -> float:
        return self.used / self.total

    @property
    def text(self) -> str:
        return f"{self.used / GIB:.2f} of {self.total / GIB:.2f} GiB"


@dataclass(frozen=True, eq=False, slots=True)
class Pool:
    """One amount of memory.

    ``read`` may block as long as the kernel does. ``high_at``, ``stop_at``: shares that are told of, and that stop
    admission (None: never); ``slack``: how far below them it is over. ``shared``: all models of the process use it.
    """

    name: str
    scope: Scope
    read: Callable[[], Use | None] = field(repr=False)
    card: str = ""
    partition: str = ""
    high_at: float = 0.90
    stop_at: float | None = 0.95
    slack: float = 0.03
    shared: bool = False

    @property
    def labels(self) -> tuple[str, str, str]:
        return self.scope, self.card, self.partition


# --- a GPU ----------------------------------------------------------------------------------------------------------


def card_pools(node: Node, root: Path = Path("/")) -> dict[int, Pool]:
    """Card index → its memory, for every card of ``node`` whose files are under ``root`` (a mirror of / or of /sys).

    Engines take most of a card at their start and then grow little, so that admission stops later than elsewhere.
    """
    found: dict[int, Pool] = {}
    for card in node.cards:
        folder = _card_folder(root, card.bdf) if card.bdf else None
        if folder is not None:
            found[card.index] = Pool(
                f"card {card.index} ({card.bdf}, all of its partitions)",
                "card",
                lambda folder=folder: _vram(folder),  # type: ignore[misc]
                card=str(card.index),
                stop_at=0.98,
                slack=0.01,
            )
    return found


def _card_folder(root: Path, bdf: str) -> Path | None:
    places = [*(base / folder for base in (root / "sys", root) for folder in _PCI_FOLDERS), root]
    return next((folder for place in places if (folder := place / bdf).is_dir()), None)


def _vram(folder: Path) -> Use | None:
    said = vram_use(folder)
    return None if said is None else Use(*said)


# --- a CPU partition ------------------------------------------------------------------------------------------------


def process_pool(
    pid: Callable[[], int | None],
    limit_bytes: int,
    *,
    name: str,
    card: str = "",
    partition: str = "",
    proc: Path = Path("/proc"),
) -> Pool:
    """What an engine's processes hold, against the memory of its partition. ``pid`` is asked at each reading: an engine
    that is started again has another one; None: it does not run.

    Every process's own pages, and of pages that may be shared (files, shared memory) as many as the process has that
    maps the most: weights are among these where llama.cpp maps them, and vLLM's processes map the same libraries, which
    take gigabytes counted three times. PSS would be exact, but its file costs the engine a walk over its page tables.
    """

    def read() -> Use | None:
        first = pid()
        if first is None:
            return None
        resident = [_resident(proc / str(each)) for each in _tree(proc, first)]
        own, shareable = sum(own for own, _ in resident), max((pages for _, pages in resident), default=0)
        return Use((own + shareable) * _PAGE_BYTES, limit_bytes)

    return Pool(name, "partition", read, card=card, partition=partition)


def _tree(proc: Path, first: int) -> Iterator[int]:
    """``first`` and its descendants. ``children`` files, where psutil would look at every process of the machine."""
    waiting, seen = [first], 0
    while waiting and seen < _MOST_PROCESSES:
        pid = waiting.pop()
        seen += 1
        yield pid
        for file in proc.glob(f"{pid}/task/*/children"):
            waiting += [int(word) for word in (_text(file) or "").split()]


def _resident(process: Path) -> tuple[int, int]:
    """Pages of its own, pages of files and shared memory; none of a process that has ended meanwhile."""
    words = (_text(process / "statm") or "").split()
    if len(words) < 3:
        return 0, 0
    return int(words[1]) - int(words[2]), int(words[2])


# --- what all share -------------------------------------------------------------------------------------------------


def cgroup_pool(root: Path = Path("/")) -> Pool | None:
    """The container's memory, or that of the cgroup above it with the least limit; None where there is no limit.

    Use is the kubelet's working set, ``current - inactive_file``: the kernel drops inactive file pages before it kills.
    https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/

    Raises:
        NodeError: a file does not hold what the kernel writes.
    """
    limit = memory_limit_file(root)
    return None if limit is None else Pool("this container", "cgroup", lambda: _working_set(limit), shared=True)


def _working_set(limit: Path) -> Use | None:
    v2 = limit.name == "memory.max"
    current = _text(limit.with_name("memory.current" if v2 else "memory.usage_in_bytes"))
    total = _text(limit)
    if not current or not total or not total.isdecimal():
        return None
    idle = _value_of(limit.with_name("memory.stat"), "inactive_file" if v2 else "total_inactive_file") or 0
    return Use(max(0, int(current) - idle), int(total))


def machine_pool(root: Path = Path("/")) -> Pool:
    """The machine's memory: what is not available without swapping."""
    return Pool("this machine", "machine", lambda: _machine(root / "proc/meminfo"), shared=True)


def _machine(meminfo: Path) -> Use | None:
    total, available = _value_of(meminfo, "MemTotal:"), _value_of(meminfo, "MemAvailable:")
    if not total or available is None:
        return None
    return Use((total - available) * 1024, total * 1024)


# --- files ----------------------------------------------------------------------------------------------------------


def _value_of(file: Path, key: str) -> int | None:
    """Of lines ``key value …``."""
    for line in (_text(file) or "").splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == key:
            return int(words[1])
    return None


def _text(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return opened.read(_MOST_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return None
