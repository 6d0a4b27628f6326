"""A LoRA adapter's GGUF file, looked at before llama.cpp does.

llama.cpp reads adapters trustingly: an alpha that is no float, a tensor of integers or of one dimension too many, or
an adapter of tied embeddings ends the process (an assertion, some of them only at the next step); an adapter without
tensors, or of norms, loads and changes nothing. All of it is refused here, by name. What is checked is what is loaded:
a copy in memory, whose digest tells one adapter's KV cache from another's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from aim_kserve.errors import BadRequest
from aim_profile.errors import ModelError
from aim_profile.models.gguf import Contents, Tensor, read_header, read_tensors
from aim_runtime.engines.adapters import refused

_CHUNK_BYTES = 1 << 20
_FLOAT32 = 6  # GGUF's code of a metadata value's type
_ALPHA = "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"
#: Types that a matrix of an adapter may have: what convert_lora_to_gguf.py writes.
_MATRIX_TYPES = ("fp32", "fp16", "bf16", "q8_0")
_A, _B = ".lora_a", ".lora_b"
_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"
#: Looked up or convolved, never multiplied: llama.cpp would load an adapter of them and not apply it.
_NEVER_APPLIED = ("position_embd.weight", "token_types.weight", "ssm_conv1d.weight")
_CONVERT = "convert it with llama.cpp's convert_lora_to_gguf.py --base MODEL_DIRECTORY ADAPTER_DIRECTORY"
_NAMED_AT_MOST = 3


class Refusal(Exception):
    """Why a file is no adapter of this model: one sentence, without the file's name."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What an adapter must fit. ``shapes``: tensor → its dimensions, the fastest first. ``size_bytes``: of the file."""

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]
    size_bytes: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read off a GGUF file. Takes tenths of a second. Raises ModelError."""
        tensors = read_tensors(path)
        architecture = str(read_header(path).metadata.get("general.architecture"))
        return cls(architecture, {t.name: t.shape for t in tensors}, sum(t.size_bytes for t in tensors))


class Copy:
    """An adapter's bytes in memory, checked; a context manager.

    ``path`` is where llama.cpp opens them, ``digest`` their SHA-256, ``modules`` the model's tensors it changes.

    Raises:
        BadRequest: names the adapter, its file and what is wrong with it.
    """

    def __init__(self, name: str, file: Path, base: BaseModel) -> None:
        try:
            self._descriptor, self.digest = _copied(file, base.size_bytes)
        except OSError as error:
            raise refused(name, file, f"cannot be read: {error.strerror or error}") from error
        except Refusal as refusal:
            raise refused(name, file, str(refusal)) from refusal
        self.path = Path(f"/proc/self/fd/{self._descriptor}")
        try:
            self.modules = check(read_header(self.path), base)
        except ModelError as error:
            raise self._closed(refused(name, file, str(error).removeprefix(f"{self.path}: "))) from error
        except Refusal as refusal:
            raise self._closed(refused(name, file, str(refusal))) from refusal

    def _closed(self, error: BadRequest) -> BadRequest:
        os.close(self._descriptor)
        return error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self._descriptor)


def _copied(file: Path, most_bytes: int) -> tuple[int, str]:
    """An open descriptor of ``file``'s content in memory, and its digest. Raises OSError and Refusal."""
    _check_kind(file, most_bytes)
    digest, held = hashlib.sha256(), 0
    descriptor = os.memfd_create("lora-adapter")
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                held += len(chunk)
                _check_size(held, most_bytes)
                digest.update(chunk)
                os.writev(descriptor, [chunk])
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, digest.hexdigest()


def _check_kind(file: Path, most_bytes: int) -> None:
    if (file / "adapter_config.json").is_file():
        raise Refusal(f"a PEFT directory, and the llama_cpp engine takes GGUF adapters: {_CONVERT}")
    if not file.exists():
        raise Refusal("there is no such file")
    if not file.is_file():
        raise Refusal("not a file: give the path of a GGUF adapter")
    _check_size(file.stat().st_size, most_bytes)


def _check_size(size_bytes: int, most_bytes: int) -> None:
    """Bounds what is read: an adapter is small beside its model."""
    if size_bytes > most_bytes:
        raise Refusal(f"{size_bytes} bytes, more than the model's own tensors ({most_bytes}): not an adapter of it")


class _Pair(NamedTuple):
    """The two factors of one tensor's change, B * A."""

    a: Tensor
    b: Tensor


def check(contents: Contents, base: BaseModel) -> tuple[str, ...]:
    """The tensors of ``base`` that the adapter changes, at least one.

    Raises:
        Refusal: says why it is none.
    """
    _check_metadata(contents, base.architecture)
    pairs = _pairs(contents.tensors)
    if not pairs:
        raise Refusal("holds no LoRA tensors (…weight.lora_a and …weight.lora_b): it would change nothing")
    unknown = [name for name in pairs if name not in base.shapes]
    if unknown:
        raise Refusal(
            f"{len(unknown)} of its {len(pairs)} modules are not in the model ({_some(unknown)}): "
            "made for another model"
        )
    for name, pair in pairs.items():
        _check_pair(name, pair, base)
    return tuple(pairs)


def _check_metadata(contents: Contents, architecture: str) -> None:
    found, wanted = contents.metadata, {"general.type": "adapter", "adapter.type": "lora"}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise Refusal(f"not a LoRA adapter: {key} is {str(found.get(key))[:80]!r}, not {value!r}")
    if found.get("general.architecture") != architecture:
        other = str(found.get("general.architecture"))[:80]
        raise Refusal(f"made for a model of architecture {other!r}; this one is {architecture!r}")
    if _ALPHA in found and contents.types[_ALPHA] != _FLOAT32:
        raise Refusal(f"{_ALPHA} is no 32-bit float: {_CONVERT}")
    if _INVOCATION in found:
        raise Refusal("an activated LoRA (aLoRA), which acts on a part of the prompt only: not supported")


def _pairs(tensors: Sequence[Tensor]) -> dict[str, _Pair]:
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        half = next((half for half in (_A, _B) if tensor.name.endswith(half)), None)
        if half is None:
            raise Refusal(f"tensor {tensor.name[:80]!r} is neither {_A} nor {_B}: only plain LoRA is supported")
        halves.setdefault(tensor.name.removesuffix(half), {})[half] = tensor
    for name, found in halves.items():
        if len(found) < 2:
            raise Refusal(f"module {name[:80]!r} has one of {_A} and {_B} only")
    return {name: _Pair(found[_A], found[_B]) for name, found in halves.items()}


def _check_pair(name: str, pair: _Pair, base: BaseModel) -> None:
    shape = base.shapes[name]
    for tensor in pair:
        if tensor.type_name not in _MATRIX_TYPES:
            raise Refusal(f"{tensor.name} is of type {tensor.type_name}; an adapter's are {', '.join(_MATRIX_TYPES)}")
    if len(shape) < 2 or name.endswith(_NEVER_APPLIED):
        raise Refusal(f"{name} is no matrix of a linear layer: llama.cpp would not apply an adapter of it")
    if name == _EMBEDDINGS and _OUTPUT not in base.shapes:
        raise Refusal(f"changes {name}, which this model shares with its output layer: llama.cpp cannot apply that")
    a, b = pair.a.shape, pair.b.shape
    fits = (
        (a[1:], b[1:], a[0]) == ((shape[1],), (shape[0],), b[0])  # looked up: A is transposed
        if name == _EMBEDDINGS and len(a) == len(b) == 2
        else len(a) == len(b) == len(shape)
        and (a[0], b[1], a[1]) == (shape[0], shape[1], b[0])
        and a[2:] == b[2:] == shape[2:]
    )
    if not fits or 0 in a or 0 in b:
        raise Refusal(
            f"{name} is {_by(shape)} in the model, and its A {_by(a)} and B {_by(b)} do not make that: "
            "made for another model"
        )


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _some(names: Sequence[str]) -> str:
    more = ", …" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(name[:80] for name in names[:_NAMED_AT_MOST]) + more
