"""A bug report in one file: findings, versions, the node's facts and the kernel files they rest on, redacted.

Of a kernel file only what is known to be harmless is kept: numbers under known keys, words of a known form. Ids are
numbered anew, so that `tree/` still reads as the node it is of (`aim-profile doctor --root tree`).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from aim_profile.errors import AimProfileError
from aim_profile.nodes.bounded import read_bounded
from aim_profile.nodes.facts import Card, Node
from aim_profile.nodes.read import Places, export_node, places
from aim_profile.nodes.sysfs import BDF

from .examine import Asked, Examination
from .redaction import Redactor
from .system import System

_MAX_FILE_BYTES, _MAX_FILES, _MAX_BYTES = 65_536, 2048, 4 * 2**20
_NODES, _CARDS = "sys/class/kfd/kfd/topology/nodes", "sys/bus/pci/drivers/amdgpu"
#: Of KFD's properties: what says which GPU it is and how it is cut.
_PROPERTIES = {
    *("cpu_cores_count", "simd_count", "mem_banks_count", "io_links_count", "simd_per_cu", "array_count"),
    *("simd_arrays_per_engine", "cu_per_simd_array", "gfx_target_version", "vendor_id", "device_id", "location_id"),
    *("domain", "drm_render_minor", "num_xcc", "fw_version", "sdma_fw_version", "capability", "debug_prop"),
    *("local_mem_size", "heap_type", "size_in_bytes", "flags", "width", "mem_clk_max"),
}
_IDENTITIES = {"unique_id", "hive_id"}
_MODES, _HEX, _NUMBER = r"[A-Za-z0-9]{2,8}(?:, ?[A-Za-z0-9]{2,8}){0,7}", r"0x[0-9a-f]{1,8}", r"-?[0-9]{1,16}"
#: Files of a card's directory, and the only form in which each is kept.
_OF_A_CARD = {
    **dict.fromkeys(("vendor", "device", "class", "revision"), _HEX),
    **dict.fromkeys(("available_compute_partition", "available_memory_partition"), _MODES),
    **dict.fromkeys(("current_compute_partition", "current_memory_partition"), r"[A-Z0-9]{2,8}"),
    "compute_partition_mem_alloc_mode": r"CAPPING|ALL",
    **dict.fromkeys(("numa_node", "mem_info_vram_total", "mem_info_vram_used"), _NUMBER),
}
_VERSION = r"[0-9]{1,5}(?:\.[0-9]{1,6}){1,4}"
#: What stands first in these files is a number; what stands behind it may be anybody's.
_OF_THE_SYSTEM = {
    "sys/module/amdgpu/version": _VERSION,
    "sys/module/amdgpu/initstate": r"[a-z]{1,16}",
    "proc/sys/kernel/osrelease": _VERSION,
    "opt/rocm/.info/version": _VERSION,
}
_SHM = re.compile(r"^\S+ /dev/shm tmpfs (?:\S*,)?(size=[0-9]{1,16}k?)(?:,\S*)? ", re.MULTILINE)


class Written(NamedTuple):
    """What was written: members of the archive from the kernel, those left out, and its size."""

    kernel_files: int
    left_out: tuple[str, ...]
    size_bytes: int


def write_bundle(file: Path, asked: Asked, found: Examination) -> Written:
    """The report as tar.gz, whole or not at all. Raises AimProfileError naming the file where it cannot be written."""
    redactor = Redactor([*_names(asked, found.node), *_paths(asked)])
    kernel, left_out = _bounded(_kernel_files(found.system))
    kept = redactor.value([finding.model_dump() for finding in found.findings])
    ours = {
        "findings.json": json.dumps({"counts": found.counts, "findings": kept}, indent=2),
        "versions.json": json.dumps(found.versions, indent=2),
        "left_out.json": json.dumps(left_out, indent=2),
        "node.yaml": export_node(_nameless(found.node, redactor)),
    }
    packed = _packed({**ours, **{f"tree/{name}": text for name, text in kernel.items()}})
    _replace(file, packed)
    return Written(len(kernel), tuple(left_out), len(packed))


def _names(asked: Asked, node: Node) -> Iterator[tuple[str, str]]:
    """Every name that the node, the cluster or the plan has, whole and without its domain."""
    nodes = [node.name or "", *([os.uname().nodename] if asked.root is None else [])]
    if asked.kube is not None:
        nodes.append(asked.kube[0].metadata.name)
    if asked.plan is not None:
        plan, _, name = asked.plan
        nodes += [name or "", *(card.node for card in plan.cards)]
        yield from ((word, "workload") for one in plan.placements for word in (one.id, one.workload))
    yield from ((word, "node") for name in nodes for word in (name, name.partition(".")[0]))


def _paths(asked: Asked) -> Iterator[tuple[str, str]]:
    """Every path that was given, and the option by which."""
    yield from ((str(file), "--amd-smi") for file in asked.amd_smi)
    files = (
        *((str(asked.root or ""), "--root"), (str(asked.emulated or ""), "--node")),
        *((asked.kube[1] if asked.kube else "", "--kube-node"), (asked.plan[1] if asked.plan else "", "--plan")),
    )
    yield from (*files, (str(Path.home()), "home"))


def _nameless(node: Node, redactor: Redactor) -> Node:
    """The node's facts without its name, its ids, and what others said of it."""
    return node.model_copy(update={"name": None, "notes": (), "cards": tuple(_plain(c, redactor) for c in node.cards)})


def _plain(card: Card, redactor: Redactor) -> Card:
    known = card.is_cpu or card.accelerator is not None
    return card.model_copy(
        update={
            "unique_id": None,
            "hive_id": None,
            "bdf": card.bdf if card.bdf and BDF.fullmatch(card.bdf) else None,
            "gfx": card.gfx if card.gfx and re.fullmatch(r"gfx[0-9a-f]{3,5}", card.gfx) else None,
            "product": card.product if known else "unknown",
            "pci_id": card.pci_id if card.pci_id and re.fullmatch(_HEX, card.pci_id) else None,
            "report": None,
            "notes": tuple(map(redactor.text, card.notes)),
        }
    )


def _kernel_files(system: System) -> Iterator[tuple[str, str | None]]:
    """Names in a mirror of /, and what is kept of each; None: nothing could be."""
    if system.root is None:
        return
    for name, form in _OF_THE_SYSTEM.items():
        if (text := system.text(name)) is not None:
            found = re.match(form, text)
            yield name, f"{found[0]}\n" if found else None
    if (text := system.text("proc/cpuinfo")) is not None:
        yield "proc/cpuinfo", "flags\t\t: hypervisor\n" if re.search(r"\bhypervisor\b", text) else "flags\t\t: fpu\n"
    if said := _SHM.search(system.text("proc/mounts") or ""):
        yield "proc/mounts", f"tmpfs /dev/shm tmpfs {said[1]} 0 0\n"
    yield from _gpu_files(places(system.root))


def _gpu_files(at: Places) -> Iterator[tuple[str, str | None]]:
    numbered = _Numbered()
    for folder in _folders(at.kfd, r"[0-9]{1,5}"):
        for part in (
            "properties",
            *(f"mem_banks/{bank.name}/properties" for bank in _folders(folder / "mem_banks", r"\d+")),
        ):
            if (text := _text(folder / part)) is not None:
                yield f"{_NODES}/{folder.name}/{part}", numbered.properties(text)
        if (text := _text(folder / "gpu_id")) is not None:
            yield f"{_NODES}/{folder.name}/gpu_id", f"{numbered.of('gpu_id', text)}\n"
    for folder in _folders(at.pci, BDF.pattern):
        for name, form in _OF_A_CARD.items():
            if (text := _text(folder / name)) is not None:
                yield f"{_CARDS}/{folder.name}/{name}", f"{text}\n" if re.fullmatch(form, text) else None


class _Numbered:
    """Ids by the order in which they were met: equal ones stay equal, and nothing else is left of them."""

    def __init__(self) -> None:
        self._met: dict[tuple[str, str], int] = {}

    def of(self, kind: str, value: str) -> int:
        """0 stays 0, which means that there is none."""
        return 0 if value.strip("0") == "" else self._met.setdefault((kind, value), len(self._met) + 1)

    def properties(self, text: str) -> str:
        """`key number` lines under known keys."""
        found = re.findall(r"^(\w{1,40}) ([0-9]{1,20})$", text, re.MULTILINE)
        kept = [(key, value) for key, value in found if key in _PROPERTIES]
        kept += [(key, str(self.of(key, value))) for key, value in found if key in _IDENTITIES]
        return "".join(f"{key} {value}\n" for key, value in kept)


def _folders(folder: Path | None, form: str) -> list[Path]:
    try:
        return [] if folder is None else sorted(one for one in folder.iterdir() if re.fullmatch(form, one.name))
    except OSError:
        return []


def _text(file: Path) -> str | None:
    raw = read_bounded(file, _MAX_FILE_BYTES)
    return None if raw is None or len(raw) > _MAX_FILE_BYTES else raw.decode("utf-8", "replace").strip()


def _bounded(files: Iterable[tuple[str, str | None]]) -> tuple[dict[str, str], list[str]]:
    """What has room, and the names of the rest."""
    kept: dict[str, str] = {}
    left_out: list[str] = []
    room = _MAX_BYTES
    for name, text in files:
        if text is None or len(kept) == _MAX_FILES or len(text) > room:
            left_out.append(name)
        else:
            kept[name] = text
            room -= len(text)
    return kept, left_out[:_MAX_FILES]


def _packed(members: dict[str, str]) -> bytes:
    """The same archive of the same members, whenever and by whomever it is made."""
    raw = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as squeezed,
        tarfile.open(fileobj=squeezed, mode="w") as tar,
    ):
        for name, text in members.items():
            data = text.encode()
            info = tarfile.TarInfo(f"aim-profile-doctor/{name}")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def _replace(file: Path, content: bytes) -> None:
    """The file holds all of `content`, or what it held before."""
    part = ""
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as written:
            part = written.name
            written.write(content)
            written.flush()
            os.fsync(written.fileno())
        os.replace(part, file)
    except OSError as problem:
        if part:
            Path(part).unlink(missing_ok=True)
        raise AimProfileError(
            f"{file}: {problem.strerror}", field="bundle", value=str(file), remedy="name a file in a folder that exists"
        ) from problem
