"""A PEFT adapter's directory, looked at before vLLM does; imports no vLLM.

vLLM believes shapes: a matrix narrower than the layer is copied into a corner of it, without a word. It also knows
cached tokens by an adapter's name and path, and may read the path again later. So it is given a copy of ours, in a
directory named by the content's digest: new weights are a new path, and nobody changes them behind its back.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aim_profile.errors import ModelError
from aim_profile.models.safetensors import read_header, read_tensors
from aim_runtime.engines.adapters import refused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CHUNK_BYTES = 1 << 20
_CONFIG_BYTES = 1 << 20
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)\.weight")
_NAMED_AT_MOST = 3


class Refusal(Exception):
    """Why a directory is no adapter of this model: one sentence, without its name."""


@dataclass(frozen=True)
class BaseModel:
    """What adapters are made for: a Hugging Face directory, and the rank that the engine has room for."""

    directory: Path
    max_rank: int

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Module → its weight's shape, (outputs, inputs); empty where the weights are no safetensors."""
        try:
            tensors = read_tensors(self.directory)
        except ModelError:
            return {}
        named = ((tensor.name, tensor.shape) for tensor in tensors if len(tensor.shape) == 2)
        return {name.removesuffix(".weight"): shape for name, shape in named if name.endswith(".weight")}

    @cached_property
    def size_bytes(self) -> int:
        """Of all its files: no adapter is larger."""
        return sum(path.stat().st_size for path in self.directory.iterdir() if path.is_file())


@dataclass(frozen=True, slots=True)
class Copy:
    """An adapter that has been checked. ``path`` ends in ``digest``."""

    path: Path
    digest: str
    modules: tuple[str, ...]


class Copies:
    """Where the copies lie: a temporary directory of ours, there from the first one to :meth:`close`."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    @cached_property
    def _directory(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="aim-adapters-"))

    def take(self, name: str, source: Path) -> Copy:
        """Copy and check; reads the whole adapter. Equal content is one copy.

        Raises:
            BadRequest: names the adapter, its path and what is wrong with it.
        """
        try:
            with self._staging() as staging:
                digest = _copy(source, staging, self._base.size_bytes)
                modules = check(staging, self._base)
                path = self._directory / digest
                if not path.exists():
                    staging.rename(path)
                return Copy(path, digest, modules)
        except Refusal as refusal:
            raise refused(name, source, str(refusal)) from refusal
        except OSError as error:
            raise refused(name, source, f"cannot be read: {error.strerror or error}") from error

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        staging = Path(tempfile.mkdtemp(prefix="new-", dir=self._directory))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def drop(self, copy: Copy) -> None:
        shutil.rmtree(copy.path, ignore_errors=True)

    def close(self) -> None:
        if "_directory" in vars(self):
            shutil.rmtree(self._directory, ignore_errors=True)


def _copy(source: Path, target: Path, most_bytes: int) -> str:
    """The digest of the adapter's two files, which are copied. Raises Refusal and OSError."""
    if source.suffix == ".gguf":
        raise Refusal("a GGUF file, and the vllm engine takes PEFT directories")
    if not source.exists():
        raise Refusal("there is no such directory")
    digest = hashlib.sha256()
    for file, most in ((CONFIG, _CONFIG_BYTES), (WEIGHTS, most_bytes)):
        if not (source / file).is_file():
            raise Refusal(f"has no {file}: give a directory as PEFT's save_pretrained writes it, with safetensors")
        held = 0
        with (source / file).open("rb") as opened, (target / file).open("wb") as copied:
            while chunk := opened.read(_CHUNK_BYTES):
                held += len(chunk)
                if held > most:
                    raise Refusal(f"{file} has more than {most} bytes: it cannot be an adapter of this model")
                digest.update(chunk)
                copied.write(chunk)
        digest.update(held.to_bytes(8, "little"))
    return digest.hexdigest()


def check(directory: Path, base: BaseModel) -> tuple[str, ...]:
    """The modules that the adapter in ``directory`` changes, at least one.

    Raises:
        Refusal: says why it is none.
    """
    _check_config(directory / CONFIG, base.max_rank)
    try:
        factors = _factors(directory / WEIGHTS)
    except ModelError as error:
        raise Refusal(str(error).replace(f"{directory}/", "")) from error
    if not factors:
        raise Refusal("holds no LoRA tensors (….lora_A.weight and ….lora_B.weight): it would change nothing")
    for module, found in factors.items():
        _check_module(module, found, base)
    return tuple(factors)


def _check_config(file: Path, max_rank: int) -> None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{CONFIG} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise Refusal(f"not a LoRA adapter: peft_type in {CONFIG} is {str(found)[:80]!r}, not 'LORA'")
    for field, rank in _ranks(config):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise Refusal(f"{field} in {CONFIG} is {str(rank)[:80]!r}: a rank is a whole number from 1 on")
        if rank > max_rank:
            raise Refusal(
                f"its rank ({field}) is {rank}, and this engine has room for {max_rank}: "
                f"start it with --engine_args '--max-lora-rank {rank}'"
            )


def _ranks(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "r", config.get("r")
    patterns = config.get("rank_pattern") or {}
    if isinstance(patterns, dict):
        yield from ((f"rank_pattern.{str(name)[:80]}", rank) for name, rank in patterns.items())


def _factors(file: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module → ``A`` and ``B`` → shape."""
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in read_header(file):
        named = _FACTOR.fullmatch(tensor.name)
        if named is not None:
            factors.setdefault(named[1], {})[named[2]] = tensor.shape
    return factors


def _check_module(module: str, found: Mapping[str, tuple[int, ...]], base: BaseModel) -> None:
    if len(found) < 2:
        raise Refusal(f"module {module[:80]!r} has one of lora_A and lora_B only")
    a, b = found["A"], found["B"]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not 1 <= a[0] <= base.max_rank:
        raise Refusal(f"module {module[:80]!r}: lora_A {list(a)} and lora_B {list(b)} do not belong together")
    wanted = base.shapes.get(module)
    if wanted is not None and (b[0], a[1]) != wanted:
        raise Refusal(
            f"module {module[:80]!r} is {list(wanted)} in the model, and the adapter changes {[b[0], a[1]]}: "
            "made for another model"
        )


def some(names: list[str]) -> str:
    """The first few of them, for a message."""
    more = ", …" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(name[:80] for name in names[:_NAMED_AT_MOST]) + more
