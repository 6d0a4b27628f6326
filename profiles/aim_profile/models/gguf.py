"""A GGUF file as ModelFacts: its metadata and tensor table, never the data.

Format: ggml-org/ggml docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from aim_profile.errors import ModelError

from .facts import Attention, Experts, Mla, ModelFacts, Shape, what_is_impossible
from .parameters import Parameters, active_parameters, expert_parameters

# ggml type id → (name, values per block, bytes per block); ggml.h and gguf constants.
_TYPES = {
    0: ("fp32", 1, 4),
    1: ("fp16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("fp64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
}
# Metadata value type → struct code; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 10_000_000
# Every n-th layer is full attention, the others slide (llama.cpp, llama-model.cpp).
_SLIDING_PATTERN = {"gemma2": 2, "gemma3": 6, "cohere2": 4}
_UNIFORM = {"llama", "mistral3", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma", "phi3", "command-r", "deepseek2"}
_KNOWN = _UNIFORM | set(_SLIDING_PATTERN)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Tensor(NamedTuple):
    """One entry of the tensor table. ``shape`` as the file writes it: the fastest dimension first."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def values(self) -> int:
        return math.prod(self.shape)


class Contents(NamedTuple):
    """What a file says before its data. ``types``: metadata key → the file's own code of its value's type."""

    metadata: dict[str, Any]
    tensors: list[Tensor]
    types: dict[str, int]


def read_gguf(file: Path) -> ModelFacts:
    """Facts of a GGUF model (all its shards, if it is split); its id is the file's path.

    native_precision is the tensor type that holds most bytes (`q4_k`, `bf16`, …).
    Raises ModelError naming the file and what is wrong with it.
    """
    metadata, tensors, _ = read_header(file)
    tensors = [*tensors, *_tensors_of_other_shards(file, metadata)]
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not tensors:
        raise _bad(file, "no general.architecture or no tensors")
    by_type = Counter[str]()
    for tensor in tensors:
        by_type[tensor.type_name] += tensor.size_bytes
    shape, missing = _shape(file, architecture, metadata, tensors)
    linear = sum(t.values for t in tensors if len(t.shape) > 1 and t.name.startswith("blk."))
    total = sum(tensor.values for tensor in tensors)
    return ModelFacts(
        id=str(file),
        architecture=architecture,
        native_precision=max(by_type, key=lambda name: (by_type[name], name)),
        shape=shape,
        total_params=total,
        linear_params=linear,
        other_params=total - linear,
        expert_params=expert_parameters(shape) if shape else None,
        active_params=active_parameters(Parameters(linear, total - linear), shape) if shape else None,
        file_bytes=by_type.total(),
        bytes_by_dtype=tuple(sorted(by_type.items())),
        from_files=True,
        gguf=True,
        max_positions=(longest := _number(metadata, f"{architecture}.context_length")),
        max_positions_source=None if longest is None else str(file),
        rope_scaling=_rope_scaling(metadata, architecture),
        source=str(file),
        confidence="documented",
        missing=missing,
    )


def only_gguf(directory: Path) -> Path | None:
    """The GGUF model in that directory (the first of its shards), None where there is none.

    Raises ModelError where there are several.
    """
    files = sorted(file for file in directory.glob("*.gguf") if file.is_file())
    if not files:
        return None
    shards = {file.name: _SHARD.fullmatch(file.name) for file in files}
    if len({(shard[1], shard[3]) if shard else name for name, shard in shards.items()}) > 1:
        names = ", ".join(file.name for file in files[:8])
        raise ModelError(
            f"{directory}: holds {len(files)} GGUF models ({names})",
            field="model",
            value=str(directory),
            remedy="name one of the files",
        )
    return files[0]


def read_header(file: Path) -> Contents:
    """Metadata and tensor table of this one file.

    Raises ModelError naming the file and what is wrong with it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            return _Reader(opened, size, file).contents()
    except (OSError, struct.error, UnicodeDecodeError, RecursionError) as problem:
        raise _bad(file, f"truncated or not a GGUF file: {problem}") from problem


def read_tensors(file: Path) -> list[Tensor]:
    """The tensor table of a model, all its shards'. Raises ModelError."""
    metadata, tensors, _ = read_header(file)
    return [*tensors, *_tensors_of_other_shards(file, metadata)]


def _tensors_of_other_shards(file: Path, metadata: dict[str, Any]) -> list[Tensor]:
    return [tensor for shard in _other_shards(file, metadata) for tensor in read_header(shard).tensors]


def _shape(
    file: Path, architecture: str, metadata: dict[str, Any], tensors: list[Tensor]
) -> tuple[Shape | None, tuple[str, ...]]:
    """The dimensions, or None and what is missing."""
    if architecture not in _KNOWN:
        return None, (f"the cache layout of architecture {architecture!r} is not established",)

    def field(key: str) -> int | None:
        return _number(metadata, f"{architecture}.{key}")

    wanted = ("block_count", "embedding_length", "attention.head_count", "feed_forward_length")
    if absent := [key for key in wanted if not field(key)]:
        return None, (f"the file has no single {', '.join(absent)}",)
    hidden, heads = field("embedding_length") or 0, field("attention.head_count") or 1
    if f"{architecture}.attention.head_count_kv" in metadata and not field("attention.head_count_kv"):
        return None, ("key-value heads differ by layer",)
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = field("vocab_size") or (tokens.items if isinstance(tokens, _Length) else 0)
    try:
        return Shape(
            hidden=hidden,
            heads=heads,
            kv_heads=field("attention.head_count_kv") or heads,
            head_dim=field("attention.key_length") or hidden // heads,
            ffn=field("feed_forward_length") or 0,
            vocab=vocab,
            tied=not any(tensor.name == "output.weight" for tensor in tensors),
            attention=_attention(architecture, field("block_count") or 0, field("attention.sliding_window")),
            experts=_experts(metadata, architecture),
            mla=_latent(metadata, architecture),
        ), ()
    except ValidationError as problem:
        raise _bad(file, f"impossible dimensions: {what_is_impossible(problem)}") from problem


def _attention(architecture: str, layers: int, window: int | None) -> tuple[Attention, ...]:
    full = layers // _SLIDING_PATTERN[architecture] if architecture in _SLIDING_PATTERN and window else layers
    groups = [Attention(kind="full", layers=full)] if full else []
    if layers > full:
        groups.append(Attention(kind="sliding", layers=layers - full, window=window))
    return tuple(groups)


def _experts(metadata: dict[str, Any], architecture: str) -> Experts | None:
    count = _number(metadata, f"{architecture}.expert_count")
    if not count:
        return None
    own_width = _number(metadata, f"{architecture}.expert_feed_forward_length")
    return Experts(
        count=count,
        per_token=_number(metadata, f"{architecture}.expert_used_count") or 1,
        shared=_number(metadata, f"{architecture}.expert_shared_count") or 0,
        ffn=own_width or _number(metadata, f"{architecture}.feed_forward_length") or 0,
        dense_layers=_number(metadata, f"{architecture}.leading_dense_block_count") or 0,
    )


def _latent(metadata: dict[str, Any], architecture: str) -> Mla | None:
    rank = _number(metadata, f"{architecture}.attention.kv_lora_rank")
    if not rank:
        return None
    rope = _number(metadata, f"{architecture}.rope.dimension_count") or 0
    lengths = (f"{architecture}.attention.{part}_length" for part in ("key", "value"))
    key, value = (_number(metadata, f"{name}_mla") or _number(metadata, name) or 0 for name in lengths)
    query_rank = _number(metadata, f"{architecture}.attention.q_lora_rank")
    return Mla(kv_rank=rank, rope_dim=rope, nope_dim=key - rope, value_dim=value, query_rank=query_rank)


def _rope_scaling(metadata: dict[str, Any], architecture: str) -> str | None:
    kind = metadata.get(f"{architecture}.rope.scaling.type")
    if not isinstance(kind, str) or kind == "none":
        return None
    factor = metadata.get(f"{architecture}.rope.scaling.factor")
    original = _number(metadata, f"{architecture}.rope.scaling.original_context_length")
    by = f", factor {factor:g}" if isinstance(factor, int | float) else ""
    return f"rope scaling {kind}{by}" + (f" of {original}" if original else "")


def _number(metadata: dict[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**48:
        return None
    return value


def _other_shards(file: Path, metadata: dict[str, Any]) -> list[Path]:
    count = _number(metadata, "split.count") or 1
    if count == 1:
        return []
    named = _SHARD.fullmatch(file.name)
    if named is None or int(named.group(3)) != count:
        raise _bad(file, f"one of {count} shards, but not named NAME-00001-of-{count:05d}.gguf")
    shards = [file.with_name(f"{named.group(1)}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise _bad(file, f"shard {absent[0]} is missing")
    return [shard for shard in shards if shard != file]


_LENGTH = struct.Struct("<Q")


class _Reader:
    """Reads the header in order; every length is checked against the file's size before it is used."""

    def __init__(self, opened: BufferedReader, size: int, file: Path) -> None:
        self._opened, self._size, self._file = opened, size, file

    def contents(self) -> Contents:
        magic, version = self._opened.read(4), self._scalar("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise _bad(self._file, f"not a GGUF file of version 2 or 3 (magic {magic!r}, version {version})")
        tensor_count, key_count = self._count(), self._count()
        pairs = [self._pair() for _ in range(key_count)]
        tensors = [self._tensor() for _ in range(tensor_count)]
        held = sum(tensor.size_bytes for tensor in tensors)
        if self._opened.tell() + held > self._size:
            raise _bad(self._file, f"truncated: the tensors take {held} bytes, the file has {self._size}")
        metadata = {key: value for key, _, value in pairs}
        return Contents(metadata, tensors, {key: kind for key, kind, _ in pairs})

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._opened.read(struct.calcsize(code)))[0]

    def _count(self) -> int:
        count = int(self._scalar("Q"))
        if count > min(_MAX_ITEMS, self._size):
            raise _bad(self._file, f"truncated or garbled: {count} items in {self._size} bytes")
        return count

    def _string(self) -> str:
        return self._opened.read(self._count()).decode("utf-8", errors="replace")

    def _pair(self) -> tuple[str, int, Any]:
        key, kind = self._string(), int(self._scalar("I"))
        return key, kind, self._value(kind)

    def _value(self, kind: int) -> Any:
        """A scalar or string as it is; an array as its length: no dimension needs more of it."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._code(kind))
        item, count = int(self._scalar("I")), self._count()
        if item == _STRING:
            self._skip_strings(count)
        elif item == _ARRAY:
            for _ in range(count):
                self._value(item)
        else:
            self._opened.seek(count * struct.calcsize(self._code(item)), 1)
        return _Length(count)

    def _skip_strings(self, count: int) -> None:
        """A vocabulary and its merges: hundreds of thousands, most of a start's time if each were built."""
        read, length_of, most = self._opened.read, _LENGTH.unpack, min(_MAX_ITEMS, self._size)
        for _ in range(count):
            (length,) = length_of(read(8))
            if length > most or len(read(length)) < length:
                raise _bad(self._file, f"truncated or garbled: a text of {length} bytes")

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _bad(self._file, f"unknown metadata type {kind}")
        return _SCALARS[kind]

    def _tensor(self) -> Tensor:
        name, dimensions = self._string(), int(self._scalar("I"))
        if dimensions > 8:
            raise _bad(self._file, f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(int(self._scalar("Q")) for _ in range(dimensions))
        kind, _offset = int(self._scalar("I")), self._scalar("Q")
        if kind not in _TYPES:
            raise _bad(self._file, f"tensor {name!r} has unknown type {kind}")
        type_name, block, block_bytes = _TYPES[kind]
        return Tensor(name, type_name, shape, math.prod(shape) // block * block_bytes)


class _Length(NamedTuple):
    """Stands for an array of that many items."""

    items: int


def _bad(file: Path, problem: str) -> ModelError:
    return ModelError(f"{file}: {problem}", field=str(file))
