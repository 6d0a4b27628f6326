"""Finding the GGUF file and looking at it before llama.cpp does: its own refusals are long and name no remedy."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from aim_runtime.engines.base import ModelLoadError

_MAGIC = b"GGUF"
_HEADER = struct.Struct("<4sIQQ")  # magic, version, tensor count, metadata count (ggml/docs/gguf.md)
_VERSIONS = (2, 3)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def find_gguf(location: Path) -> Path:
    """The model file: ``location`` itself, or the only ``*.gguf`` in that directory.

    Raises:
        ModelLoadError: nothing there, several files, or the file is no complete GGUF header.
    """
    if not location.exists():
        raise ModelLoadError(f"model_dir {location} does not exist")
    path = _only_gguf(location) if location.is_dir() else location
    _check_header(path)
    return path


def _only_gguf(directory: Path) -> Path:
    found = sorted(directory.glob("*.gguf"))
    if not found:
        there = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
        raise ModelLoadError(f"model_dir {directory} holds no *.gguf file (it holds: {there})")
    if len(found) > 1 and (first := _first_part(found)) is not None:
        return first
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ModelLoadError(f"model_dir {directory} holds {len(found)} GGUF files ({names}): name one of them")
    return found[0]


def _first_part(paths: list[Path]) -> Path | None:
    """The first of one model's parts (``gguf-split``), which llama.cpp takes for all; None if they are no such."""
    parts = [_PART.fullmatch(path.name) for path in paths]
    names = {(part[1], part[3]) for part in parts if part}
    complete = all(parts) and len(names) == 1 and len(paths) == int(names.pop()[1])
    return paths[0] if complete else None


def _check_header(path: Path) -> None:
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror or error}") from error
    if header[:4] != _MAGIC:
        what = "is empty" if not header else f"begins with {header[:4]!r}, not {_MAGIC!r}: it is no GGUF file"
        raise ModelLoadError(f"{path} {what}")
    if len(header) < _HEADER.size:
        raise ModelLoadError(f"{path} is truncated: {size_bytes} bytes are less than a GGUF header")
    _, version, _, _ = _HEADER.unpack(header)
    if version not in _VERSIONS:
        known = " and ".join(map(str, _VERSIONS))
        raise ModelLoadError(f"{path} is GGUF version {version}; versions {known} can be read")
