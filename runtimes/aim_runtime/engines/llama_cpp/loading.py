"""From a model file to a running engine: the model, its context, the decode thread, and what prepares requests."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from aim_runtime.engines.base import ModelLoadError

from .background import Background
from .chat_template import ChatTemplate, TemplateRefusal
from .exact import CHUNK_TOKENS
from .file import find_gguf
from .limits import Limits
from .prompts import Prompts

if TYPE_CHECKING:  # the libraries behind these take 0.3 s to import: load() does it
    from .bindings import LlamaContext, LlamaModel
    from .constraint import Constraints
    from .scheduler import Scheduler

logger = logging.getLogger("aim.engine.llama_cpp")

_CELL_STEP = 256  # llama.cpp pads the cache to this


@dataclass(frozen=True, slots=True)
class Sizes:
    """As in LlamaCppEngine; ``max_model_len`` None: what the model was trained on."""

    max_model_len: int | None
    slots: int
    threads: int
    max_waiting: int
    batch_tokens: int
    kv_cache_memory_bytes: int
    parked_memory_bytes: int
    deterministic: bool = False

    def cells(self, max_model_len: int, kv_bytes_per_token: int) -> int:
        """Cache cells: what the memory holds, but one full sequence at least and all slots' at most."""
        cells = max(max_model_len, min(self._affordable(kv_bytes_per_token), self.slots * max_model_len))
        return _whole_steps(cells)

    def streams(self, max_model_len: int, kv_bytes_per_token: int) -> tuple[int, int]:
        """Slots, and cells of all of them, where each has cells of its own for a full sequence: as many as the memory
        holds, one at least."""
        cells = _whole_steps(max_model_len)
        slots = max(1, min(self.slots, self._affordable(kv_bytes_per_token) // cells))
        return slots, slots * cells

    def _affordable(self, kv_bytes_per_token: int) -> int:
        return self.kv_cache_memory_bytes // max(1, kv_bytes_per_token)


def _whole_steps(cells: int) -> int:
    return -(-cells // _CELL_STEP) * _CELL_STEP


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a loaded engine has."""

    model: LlamaModel
    scheduler: Scheduler
    prompts: Prompts
    limits: Limits
    background: Background
    constraints: Callable[[], Constraints]  # call it in a thread: the first time takes 0.4 s
    has_template: bool
    path: Path
    slots: int

    @property
    def stalled_s(self) -> float:
        """Seconds since the decode loop last went on, or that a request has been in preparation."""
        return max(self.scheduler.stalled_s, self.background.stalled_s)


def load(model_dir: Path, sizes: Sizes) -> Loaded:
    """Load the file and start the decode thread. Takes seconds: call it in a thread.

    Raises:
        ModelLoadError: no such file, not a GGUF, not a model llama.cpp knows, or no memory for it.
    """
    path = find_gguf(model_dir)
    try:
        from .bindings import LlamaError, LlamaModel
    except ImportError as error:
        raise ModelLoadError(
            f"the engine's libraries cannot be imported ({error}): pip install 'aim-kserve[embedded]'"
        ) from error
    if importlib.util.find_spec("llguidance") is None:
        raise ModelLoadError("llguidance is not installed: pip install 'aim-kserve[embedded]'")
    from .scheduler import Scheduler

    try:
        model = LlamaModel(path)
        max_model_len = _fitting_length(sizes.max_model_len, model.trained_context, path)
        context, slots = _new_context(model, sizes, max_model_len)
    except LlamaError as error:
        raise ModelLoadError(f"llama.cpp cannot load {path}: {error}") from error
    template = _template_of(model, path)
    scheduler = Scheduler(
        model,
        context,
        slots=slots,
        max_waiting=sizes.max_waiting,
        parked_memory_bytes=sizes.parked_memory_bytes,
        deterministic=sizes.deterministic,
    )
    scheduler.start()
    limits = Limits(max_model_len, model.token_bytes, model.vocabulary_size, scheduler.capacity)
    background = Background("llama-background")
    prompts = Prompts(model, template, limits, background)
    return Loaded(model, scheduler, prompts, limits, background, _constraints(model), template is not None, path, slots)


def _new_context(model: LlamaModel, sizes: Sizes, max_model_len: int) -> tuple[LlamaContext, int]:
    """A context and its slots; told where there are fewer than wanted."""
    slots, cells = sizes.slots, sizes.cells(max_model_len, model.kv_bytes_per_token)
    batch_tokens = sizes.batch_tokens
    if sizes.deterministic:
        slots, cells = sizes.streams(max_model_len, model.kv_bytes_per_token)
        batch_tokens = max(CHUNK_TOKENS, batch_tokens)
    if slots < sizes.slots:
        logger.warning(
            "deterministic: each sequence has a cache of its own for %d tokens, and %d MiB hold %d of them, not %d: "
            "a smaller max_model_len or more kv_cache_memory_bytes give more",
            max_model_len,
            sizes.kv_cache_memory_bytes // 2**20,
            slots,
            sizes.slots,
        )
    context = model.new_context(
        cells=cells, slots=slots, batch_tokens=batch_tokens, threads=sizes.threads, streams=sizes.deterministic
    )
    return context, slots


def _constraints(model: LlamaModel) -> Callable[[], Constraints]:
    """Imported, and its tree of the vocabulary built, by the first request that asks for a schema."""

    @cache
    def constraints() -> Constraints:
        from .constraint import Constraints

        return Constraints(model)

    return constraints


def _fitting_length(wanted: int | None, trained: int, path: Path) -> int:
    length = wanted or trained
    if length > trained:
        raise ModelLoadError(
            f"max_model_len {length} is {length - trained} tokens more than {path.name} was trained on ({trained})"
        )
    return length


def _template_of(model: LlamaModel, path: Path) -> ChatTemplate | None:
    if model.chat_template is None:
        return None
    try:
        return ChatTemplate(model.chat_template, {"bos_token": model.bos_text, "eos_token": model.eos_text})
    except TemplateRefusal as error:
        raise ModelLoadError(f"{path}: {error}") from error
