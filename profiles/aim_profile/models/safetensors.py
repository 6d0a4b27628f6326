"""Exact tensor sizes from safetensors files: the header alone is read, never the data.

Format: 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}}, then the data
(huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple

from aim_profile.errors import ModelError

_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own bound
_SHARD = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})\.safetensors")
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}


class Tensor(NamedTuple):
    """One tensor: its name, dtype as the file writes it, shape, and bytes on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def read_tensors(directory: Path) -> list[Tensor]:
    """All tensors of a Hugging Face directory, by its index where there is one; [] without safetensors.

    Raises ModelError for a missing shard, a truncated file or a header that is not one.
    """
    return [tensor for file in _weight_files(directory) for tensor in read_header(file)]


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        absent = [name for name in names if not isfile(directory / name)]
        if absent:
            raise _bad(index, f"the index names {len(absent)} missing shards, {absent[0]} first")
        return [directory / name for name in names]
    found = sorted(directory.glob("*.safetensors"))
    # `consolidated*` repeats the weights in the vendor's own layout; adapters are not the model.
    files = [file for file in found if not file.name.startswith(("consolidated", "adapter"))]
    _refuse_incomplete(files)
    return files


def _refuse_incomplete(files: list[Path]) -> None:
    """Without an index the shards' own names say how many there are: half a download must not pass for a model."""
    shards = {found.groups(): file for file in files if (found := _SHARD.fullmatch(file.name))}
    there = {file.name for file in files}
    for (stem, count), file in shards.items():
        names = (f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1))
        if absent := next((name for name in names if name not in there), None):
            raise _bad(file, f"one of {int(count)} shards, of which {absent} is missing; complete the download")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise _bad(index, f"not a safetensors index: {problem}") from problem
    if not isinstance(found, dict) or not all(_is_file_name(name) for name in found.values()):
        raise _bad(index, "weight_map must map tensor names to file names of this directory")
    return found


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and "\0" not in name and Path(name).name == name


def read_header(file: Path) -> Iterator[Tensor]:
    """The tensors of one file. Raises ModelError, as :func:`read_tensors`."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise _bad(file, f"truncated: the header claims {length} bytes, the file has {size}")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                yield _tensor(file, name, entry, size - 8 - length)
    except (OSError, ValueError, AttributeError, RecursionError) as problem:
        raise _bad(file, f"not a safetensors header: {problem}") from problem


def _tensor(file: Path, name: str, entry: Any, data_bytes: int) -> Tensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise _bad(file, f"tensor {name!r}: bad entry ({problem!r})") from problem
    if not 0 <= begin <= end <= data_bytes:
        raise _bad(file, f"truncated: tensor {name!r} ends at {end}, the data at {data_bytes}")
    if dtype in _BITS and -(-math.prod(shape) * _BITS[dtype] // 8) != end - begin:
        raise _bad(file, f"tensor {name!r}: {dtype} {list(shape)} does not fill {end - begin} bytes")
    return Tensor(name, dtype, shape, end - begin)


def _bad(file: Path, problem: str) -> ModelError:
    return ModelError(f"{file}: {problem}", field=str(file))
