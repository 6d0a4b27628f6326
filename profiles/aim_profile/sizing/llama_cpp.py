"""What llama.cpp holds beside the weights: its cache, the buffers of a step, and the process around it.

None of vLLM's constants applies: there is no profiling run, no captured graph and no second copy of the weights (the
file is mapped). Sources: llama.cpp's own log of its buffers (llama-cpp-python 0.3.36, CPU), and the resident memory
of this project's embedded engine with SmolLM2-135M-Instruct Q4_1 (49,152 tokens of vocabulary, 92 MiB of weights,
x86-64): over weights and cache 80 MiB once loaded, 133 MiB after it had answered a prompt of several steps, a request
with a JSON schema and one with the logprobs of its prompt.
"""

from __future__ import annotations

from typing import Protocol

from aim_profile.errors import SizingError
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.units import MIB

from .kv_cache import KvDtype, kv_bytes_per_token, shape_of

# The 133 MiB that were measured, and a fifth more: interpreter, libraries, vocabulary, schema engine.
PROCESS_BYTES = 160 * MIB
# Tokens the embedded engine computes in one step (its `batch_tokens`).
STEP_TOKENS = 512
# The cache is allocated in whole steps of so many tokens.
CELL_STEP = 256
_FLOAT_BYTES, _MASK_BYTES = 4, 2
# What a file of that kind of blocks is, where somebody asks in the words of other formats.
_SAME_BITS: dict[Precision, tuple[str, ...]] = {
    "int4": ("q4_", "iq4_"),
    "int8": ("q8_",),
    "bf16": ("bf16",),
    "fp16": ("fp16",),
    "mxfp4": ("mxfp4",),
}


class Asked(Protocol):
    """The part of a sizing request that matters here (sizing.fit.Request)."""

    @property
    def precision(self) -> Precision | None: ...
    @property
    def tp(self) -> int: ...
    @property
    def kv_dtype(self) -> KvDtype: ...
    @property
    def lora_slots(self) -> int: ...


def overhead_bytes(model: ModelFacts) -> int:
    """Bytes beside weights and cache: the process, one step's logits and activations, the cache's last padding.

    llama.cpp reserves float32 logits for every token of a step: 4 * step * (vocabulary + hidden) is within 1 % of its
    "compute buffer size" without the mask (98.25 MiB for SmolLM2 at 512 tokens a step).
    """
    shape = shape_of(model, 1)
    step = _FLOAT_BYTES * STEP_TOKENS * (shape.vocab + shape.hidden)
    return PROCESS_BYTES + step + (CELL_STEP - 1) * bytes_per_cell(model)


def bytes_per_cell(model: ModelFacts) -> int:
    """Bytes of one token of context: its keys and values in float16, and its column of a step's mask.

    Windowed layers hold every token: llama.cpp's `swa_full`, which it defaults to.
    """
    return kv_bytes_per_token(model) + _MASK_BYTES * STEP_TOKENS


def check_request(model: ModelFacts, asked: Asked) -> None:
    """Raises SizingError for what the embedded engine does not do, naming the field and the remedy."""
    if asked.tp > 1:
        raise _refused("tp", asked.tp, "llama.cpp runs a model on one device", "ask for tensor parallel 1")
    if asked.kv_dtype == "fp8":
        raise _refused("kv_dtype", "fp8", "llama.cpp keeps its cache in 16 bits here", "leave it at auto")
    precision, held = asked.precision, model.native_precision or ""
    if precision is not None and not held.startswith(_SAME_BITS.get(precision, ("nothing",))):
        problem = f"{model.id}: the file holds {held}, it cannot be served as {precision}"
        raise _refused("precision", precision, problem, f"leave precision out to use {held}, or convert the file")


def _refused(field: str, value: object, problem: str, remedy: str) -> SizingError:
    return SizingError(problem, field=field, value=value, remedy=remedy)
