"""The node's own files, live or recorded: what a check may read, without telling a recording from the machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aim_profile.nodes.bounded import read_bounded

# /proc/cpuinfo and /proc/mounts of a large node are hundreds of kilobytes.
_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True)
class System:
    """root None: an emulated node, or one by saved amd-smi output: it has no files to read.

    live: root is this very machine's /. environment: the variables of this process, None of another machine.
    """

    root: Path | None
    live: bool = False
    environment: Mapping[str, str] | None = None

    def path(self, name: str) -> Path | None:
        """`sys/module/amdgpu` of the tree, which may be a mirror of / or of /sys; None where it is not there."""
        if self.root is None:
            return None
        places = [self.root / name]
        if name.startswith("sys/"):
            places.append(self.root / name.removeprefix("sys/"))
        return next((found for found in places if os.path.lexists(found)), None)

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return self.path(name) is not None

    def text(self, name: str) -> str | None:
        """The file's text without blanks around it; None where it is absent, refused, empty or no text."""
        path = self.path(name)
        raw = None if path is None else read_bounded(path, _MAX_FILE_BYTES)
        if raw is None or len(raw) > _MAX_FILE_BYTES:
            return None
        return raw.decode("utf-8", "replace").strip() or None

    def usable(self, name: str) -> bool | None:
        """Whether a device file may be read and written: by this process, or in a recording by its group or all.

        None where it is not there.
        """
        path = self.path(name)
        if path is None:
            return None
        if self.live:
            return os.access(path, os.R_OK | os.W_OK)
        mode = stat.S_IMODE(path.lstat().st_mode)
        return any(mode & both == both for both in (0o060, 0o006))

    def size_bytes(self, mount: str) -> int | None:
        """What a mounted tmpfs can hold; None where that is not to be had."""
        if self.live:
            try:
                found = os.statvfs(f"/{mount}")
            except OSError:
                return None
            return found.f_frsize * found.f_blocks
        return _mounted_bytes(self.text("proc/mounts") or "", f"/{mount}")


def _mounted_bytes(mounts: str, at: str) -> int | None:
    """`size=65536k` of the last line of /proc/mounts that names the place."""
    sizes = [
        option.removeprefix("size=")
        for line in mounts.splitlines()
        if len(fields := line.split()) > 3 and fields[1] == at
        for option in fields[3].split(",")
        if option.startswith("size=")
    ]
    if not sizes or not sizes[-1].removesuffix("k").isdecimal():
        return None
    return int(sizes[-1].removesuffix("k")) * (1024 if sizes[-1].endswith("k") else 1)
