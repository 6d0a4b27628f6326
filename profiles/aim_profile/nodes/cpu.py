"""The processors and the memory of a machine without a GPU: what this process may use of them, now.

Read from /proc and /sys (proc(5), Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst): the CPUs
of the affinity mask that are online, no more than the cgroups' quota; the least of what the machine has, what is
available on it, and what the cgroups allow. A limit of a cgroup above ours binds us too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from os.path import isdir
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from aim_profile.errors import NodeError

from .bounded import read_bounded
from .facts import CPU, MOST_CPUS, Card, Partition

_MAX_FILE_BYTES = 2**22
_MAX_MEMORY_KIB = 2**40  # 1 PiB
_CGROUPS = "sys/fs/cgroup"
# Below this (a sixteenth of the largest number) a version 1 limit is one: unset, it is the largest page multiple.
_V1_UNSET_BYTES = 2**59


class _Bound(NamedTuple):
    """A limit, its name, and the file that says so."""

    amount: int
    by: str
    file: Path


def read_cpu(root: Path) -> Card | None:
    """The machine at `root` as a card of one device; None where its /proc/meminfo is not there.

    compute_units: logical CPUs that may work at once, never less than 1; memory in MiB, rounded down.
    Raises NodeError naming the file and what is wrong.
    """
    memory = _memory(root)
    if memory is None:
        return None
    notes: list[str] = []
    cpus = _cpus(root)
    least = min(memory, key=lambda bound: bound.amount)
    if not (mib := least.amount // 2**20):
        raise _bad(least.file, f"less than 1 MiB of memory, by {least.by}")
    notes.append("memory: the least of " + ", ".join(f"{b.by} {b.amount // 2**20} MiB" for b in memory))
    quota = min(_quotas(root), key=lambda bound: bound.amount, default=None)
    cores = len(cpus) or None
    if quota is not None and quota.amount < (cores or MOST_CPUS) * 1000:
        notes.append(f"{quota.by} allows {quota.amount / 1000:g} CPUs' time")
        cores = max(1, quota.amount // 1000)
    if not cpus:
        notes.append("which CPUs may be used is not readable here")
    device = Partition(index=0, compute_units=cores, memory_mib=mib, memory_source="measured", cpus=cpus)
    return Card(index=0, product=CPU, partitionable=False, partitions=(device,), notes=tuple(notes))


def memory_limit_file(root: Path) -> Path | None:
    """The file that holds the least memory limit of our cgroups: `memory.max`, or version 1's
    `memory.limit_in_bytes`; its folder says what is in use. None: no limit. Raises NodeError naming the file."""
    least = min(_memory_limits(root), key=lambda bound: bound.amount, default=None)
    return None if least is None else least.file


def cpu_list(text: str, named: Path | str) -> tuple[int, ...]:
    """`0-3,8` (cpuset(7), "List format", in the kernel's ascending order) as ids. Raises NodeError naming `named`."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*([0-9]{1,6})(?:-([0-9]{1,6}))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        if not first <= last < MOST_CPUS or (found and first <= found[-1]):
            raise _bad(named, f"{part.strip()[:40]!r} is not the next CPU or range of CPUs below {MOST_CPUS}")
        found.extend(range(first, last + 1))
    return tuple(found)


def _memory(root: Path) -> list[_Bound] | None:
    file = root / "proc/meminfo"
    text = _text(file)
    if text is None:
        return None
    bounds = []
    for key in ("MemTotal", "MemAvailable"):
        line = re.search(rf"^{key}:(.*)$", text, re.MULTILINE)
        if line is None and key == "MemTotal":
            raise _bad(file, "no MemTotal")
        if line is not None:
            bounds.append(_Bound(_kib(file, key, line[1]) * 1024, key, file))
    return [*bounds, *_memory_limits(root)]


def _kib(file: Path, key: str, text: str) -> int:
    found = re.fullmatch(r"\s*([0-9]{1,16})\s+kB\s*", text)
    if found is None or int(found[1]) > _MAX_MEMORY_KIB:
        raise _bad(file, f"{key}: {text.strip()[:40]!r} is not a size in kB")
    return int(found[1])


def _memory_limits(root: Path) -> Iterator[_Bound]:
    """The least limit of each version's hierarchy, where there is one."""
    groups = _groups(root)
    for version, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        files = (folder / name for folder in _folders(root, groups, version))
        limits = [_Bound(limit, f"cgroup {name}", file) for file in files if (limit := _limit(file)) is not None]
        if limits:
            yield min(limits)


def _limit(file: Path) -> int | None:
    text = _text(file)
    if text is None or text.strip() == "max":
        return None
    limit = _whole(file, text)
    return limit if limit < _V1_UNSET_BYTES else None


def _quotas(root: Path) -> Iterator[_Bound]:
    """CPU time in thousandths of a CPU."""
    groups = _groups(root)
    for folder in _folders(root, groups, ""):
        words = (_text(file := folder / "cpu.max") or "max").split()
        if words[:1] != ["max"]:
            if len(words) != 2:
                raise _bad(file, f"{' '.join(words)[:40]!r} is not `quota period`")
            yield _quota(file, *words)
    for folder in _folders(root, groups, "cpu"):
        quota, period = _text(file := folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota is not None and period is not None and quota.strip() != "-1":
            yield _quota(file, quota, period)


def _quota(file: Path, quota: str, period: str) -> _Bound:
    if not (period_us := _whole(file, period)):
        raise _bad(file, "a period of 0")
    return _Bound(_whole(file, quota) * 1000 // period_us, f"cgroup {file.name}", file)


def _groups(root: Path) -> dict[str, PurePosixPath]:
    """Our cgroup in each hierarchy by controller, "" for version 2; a line is `number:controllers:path`."""
    found: dict[str, PurePosixPath] = {}
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            found[controller] = PurePosixPath(path or "/")
    return found


def _folders(root: Path, groups: dict[str, PurePosixPath], controller: str) -> Iterator[Path]:
    """Our cgroup's folder and those above it, as far as they are mounted.

    A container often sees its own cgroup as the mount's root, whatever path it is told: then that alone is looked at.
    """
    places = (
        ("", "unified") if not controller else (controller, "cpu,cpuacct") if controller == "cpu" else (controller,)
    )
    mount = next((at for place in places if (at := root / _CGROUPS / place) and _is_mount(at, controller)), None)
    if mount is None:
        return
    path = groups.get(controller, PurePosixPath("/"))
    parts = [] if ".." in path.parts else [part for part in path.parts if part != "/"]
    for depth in range(min(len(parts), 64), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        # A name no folder can have is none, where Path would raise.
        if isdir(folder):
            yield folder


def _is_mount(folder: Path, controller: str) -> bool:
    return folder.is_dir() and (bool(controller) or (folder / "cgroup.controllers").is_file())


def _cpus(root: Path) -> tuple[int, ...]:
    """The CPUs this process may run on and that are online; empty where that is not readable."""
    status = root / "proc/self/status"
    allowed = re.search(r"^Cpus_allowed_list:(.*)$", _text(status) or "", re.MULTILINE)
    online_file = root / "sys/devices/system/cpu/online"
    online = _text(online_file)
    sets = []
    if allowed is not None:
        sets.append(cpu_list(allowed[1], status))
    if online is not None and online.strip():
        sets.append(cpu_list(online, online_file))
    if not sets:
        listed = re.findall(r"^processor\s*:\s*([0-9]{1,6})\s*$", _text(root / "proc/cpuinfo") or "", re.MULTILINE)
        return tuple(sorted({cpu for number in listed if (cpu := int(number)) < MOST_CPUS}))
    return tuple(sorted(set(sets[0]).intersection(*sets[1:])))


def _whole(file: Path, text: str) -> int:
    word = text.strip()
    if not (word.isascii() and word.isdecimal() and len(word) <= 20):
        raise _bad(file, f"{word[:40]!r} is not a whole number")
    return int(word)


def _text(file: Path) -> str | None:
    """The file's text, None where it is absent or refused. Raises NodeError for one that is none of /proc's."""
    raw = read_bounded(file, _MAX_FILE_BYTES)
    if raw is None:
        return None
    if len(raw) > _MAX_FILE_BYTES or b"\0" in raw:
        raise _bad(file, "too large, or not plain text")
    return raw.decode("utf-8", "replace")


def _bad(file: Path | str, problem: str) -> NodeError:
    return NodeError(f"{file}: {problem}", field=str(file), remedy="record it again, or describe the node in a file")
