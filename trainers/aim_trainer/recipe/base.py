"""The model that is tuned, before it is: where it lies, of what architecture it is, how its text becomes tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from aim_trainer.errors import JobError, TrainerError
from aim_trainer.job.job import BaseModel_

from .fetched import fetched

#: `model_type` of configurations that tiny models of are trained in the tests. Another is refused by name: that a loss
#: falls says nothing of packing, gradient checkpointing and adapters being right.
FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3")

transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class Base:
    """What transformers is asked for. name: a directory or a Hugging Face id."""

    name: str
    revision: str | None = None
    gguf_file: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Of any `from_pretrained`."""
        named: dict[str, Any] = {"pretrained_model_name_or_path": self.name, "trust_remote_code": False}
        if self.revision:
            named["revision"] = self.revision
        if self.gguf_file:
            named["gguf_file"] = self.gguf_file
        return named


def locate(model: BaseModel_) -> Base:
    """A GGUF file, a directory (s3:// too), or else a Hugging Face id. Raises JobError for what is none of them."""
    scheme = urlsplit(model.model_id).scheme
    name = model.model_id.removeprefix("file://").removeprefix("hf://")
    path = fetched(name) if scheme == "s3" else Path(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise _refused(model, "a file, but not a .gguf one; give the model's directory")
        return Base(str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise _refused(model, "a directory without config.json; give a Hugging Face model directory")
        return Base(str(path))
    if scheme == "file" or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise _refused(model, "there is no such file or directory")
    return Base(name, model.revision)


def read_config(model: BaseModel_) -> Any:
    """The model's configuration, to be changed at will. Raises JobError where it cannot be had, or is of a family that
    is not known here.
    """
    with said_of(model):
        config = _read(AutoConfig.from_pretrained, locate(model))
    if config.model_type not in FAMILIES:
        raise _refused(model, f"architecture {config.model_type!r} is not known; known are {', '.join(FAMILIES)}")
    return config


def read_tokenizer(model: BaseModel_) -> Any:
    """Its tokenizer, padding on the right; a model without a token of its own for padding pads with its end token
    (nothing learns of padding). The vocabulary never grows: resized embeddings would be part of every adapter.
    """
    with said_of(model):
        tokenizer = _read(AutoTokenizer.from_pretrained, locate(model))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise _refused(model, "its tokenizer has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _read(from_pretrained: Callable[..., Any], base: Base) -> Any:
    if base.gguf_file is None:
        return from_pretrained(**base.arguments())
    changed_ns = Path(base.name, base.gguf_file).stat().st_mtime_ns
    return copy.deepcopy(_read_once(from_pretrained, base, changed_ns))


@lru_cache(maxsize=4)
def _read_once(from_pretrained: Callable[..., Any], base: Base, changed_ns: int) -> Any:
    """transformers reads all of a GGUF file's metadata whatever it is asked for: seconds, for each word and merge of a
    vocabulary.
    """
    return from_pretrained(**base.arguments())


@contextmanager
def said_of(model: BaseModel_) -> Iterator[None]:
    """transformers' complaints about a model as ours: one line that names the field. Raises JobError."""
    try:
        yield
    except (TrainerError, MemoryError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError) as problem:
        raise _refused(model, " ".join(str(problem).split())[:500]) from problem
    except Exception as problem:
        # transformers, safetensors and tokenizers trust these files: they raise whatever comes of one that is not what
        # they think, a bare Exception, too.
        told = " ".join(str(problem).replace(";", ",").split())[:500] or type(problem).__name__
        raise _refused(model, f"{told}; look at its files, or fetch the model anew") from problem


def _refused(model: BaseModel_, why: str) -> JobError:
    problem, _, remedy = why.partition("; ")
    field = "spec.baseModel.modelId"
    return JobError(f"{field}: {model.model_id}: {problem}", field=field, value=model.model_id, remedy=remedy)
