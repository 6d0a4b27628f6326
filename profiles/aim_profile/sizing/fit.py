"""Does a model fit a device: weights, KV cache, overhead, and by how much.

    budget = utilization * what the device reports
    fits  <=>  weights * 1.02 + runtime 2.3 GiB + LoRA slots + KV <= budget        (per tensor-parallel rank)

Sources: the cache's formulas are in kv_cache.py; 1.02 and 2.3 GiB (1.7 activation peak + 0.6 outside torch) are the
planning constants of KAITO's estimator (kaito-project/kaito, model_catalog.yaml). They are estimates: an engine's own
profiling run is the last word. They are vLLM's, on a GPU; measured with its CPU build (float32, SmolLM2-135M, three
processes, shared pages counted in each) the runtime's share was 2.3 GiB too. What llama.cpp takes is in llama_cpp.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aim_profile.errors import SizingError
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.models.parameters import BYTES_PER_LINEAR_PARAMETER, SIXTEEN_BIT_BYTES
from aim_profile.units import GIB, gib

from . import llama_cpp
from .kv_cache import (
    KV_BLOCK_TOKENS,
    KvDtype,
    kv_bytes_per_sequence,
    kv_bytes_per_token,
    not_sized,
    shape_of,
    state_bytes_per_sequence,
)

Engine = Literal["vllm", "llama_cpp"]

WEIGHT_OVERHEAD = 0.02
RUNTIME_OVERHEAD_BYTES = int(2.3 * GIB)
DEFAULT_UTILIZATION = 0.90
DEFAULT_CONTEXT = 8192
# max-num-batched-tokens of the profiles derived here. vLLM's guidance for chunked prefill (docs, "Optimization and
# Tuning"): about 2048 tokens a step keeps inter-token latency low, 8192 and more favour throughput.
STEP_TOKENS: Mapping[Literal["latency", "throughput"], int] = {"latency": 2048, "throughput": 8192}
# Where neither the model nor the memory bounds the context (all layers windowed), report this much.
CONTEXT_CEILING_TOKENS = 2**24


class Request(BaseModel):
    """What is asked of a model. context: tokens per sequence (prompt and answer); concurrency: sequences
    held at once; tp: tensor-parallel ranks, one per device; precision None: the model's own;
    encoder_tokens: image tokens a sequence keeps in cross-attention layers; lora_slots: adapters
    resident at once, of rank lora_rank; utilization: share of the device the engine may take;
    max_num_batched_tokens: tokens the engine takes into one step, which windowed layers hold beside their window;
    engine: whose overhead and cache are counted (llama_cpp: the embedded engine, on a CPU).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Engine = "vllm"
    precision: Precision | None = None
    context: int = Field(default=DEFAULT_CONTEXT, ge=1, le=CONTEXT_CEILING_TOKENS)
    concurrency: int = Field(default=1, ge=1, le=1_000_000)
    tp: int = Field(default=1, ge=1, le=1024)
    kv_dtype: KvDtype = "auto"
    utilization: float = Field(default=DEFAULT_UTILIZATION, gt=0, le=1)
    encoder_tokens: int = Field(default=0, ge=0, le=CONTEXT_CEILING_TOKENS)
    lora_slots: int = Field(default=0, ge=0, le=1024)
    lora_rank: int = Field(default=16, ge=1, le=512)
    max_num_batched_tokens: int = Field(default=STEP_TOKENS["latency"], ge=1, le=CONTEXT_CEILING_TOKENS)


class Option(BaseModel):
    """Something nearby that would fit. Fields that stay as asked repeat the request's values.

    kind: what changes; accelerator/partition/tier: where, when a GPU is named; devices: how many of
    those devices it takes; headroom_gib: what is left on each; unproven: it rests on tensor parallelism over
    partitions, for which a mode's tier does not speak.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["context", "concurrency", "precision", "memory", "partition", "tensor-parallel", "accelerator"]
    description: str
    accelerator: str | None = None
    partition: str | None = None
    tier: str | None = None
    precision: str
    context: int
    concurrency: int
    tp: int
    devices: int
    headroom_gib: float
    unproven: bool = False


class Sizing(BaseModel):
    """The sum, per rank (device), GiB rounded to a thousandth: weights + kv + overhead against budget.

    weights_gib: bytes of the weights themselves; overhead_gib: 2 % of them, the runtime's share and the
    LoRA slots; kv_bytes_per_token: every self-attention layer, no window; kv_gib: what the requested
    sequences hold. headroom_gib = budget - need, negative when it does not fit; shortfall_gib =
    need - budget, 0 when it fits. max_concurrency: sequences of `context` tokens that fit; max_context:
    tokens per sequence that fit at `concurrency`; both 0 where not even the weights fit. context_limit: the longest
    context the model was made for, None: unknown, as `notes` then says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fits: bool
    engine: Engine
    model: str
    precision: str
    context: int
    concurrency: int
    tp: int
    kv_dtype: str
    utilization: float
    weights_gib: float
    kv_bytes_per_token: int
    kv_gib: float
    overhead_gib: float
    budget_gib: float
    headroom_gib: float
    shortfall_gib: float
    max_concurrency: int
    max_context: int
    max_num_batched_tokens: int
    context_limit: int | None
    alternatives: tuple[Option, ...] = ()
    notes: tuple[str, ...] = ()


class Fit(Sizing):
    """It fits, with headroom."""

    fits: Literal[True] = True


class DoesNotFit(Sizing):
    """It does not, by shortfall_gib; `alternatives` are the nearest options that would."""

    fits: Literal[False] = False


class Demand(NamedTuple):
    """Bytes on each rank's device. fixed = weights + overhead; kv = all requested sequences."""

    weights: int
    overhead: int
    kv_per_sequence: int
    kv: int

    @property
    def fixed(self) -> int:
        """Bytes taken before the first token."""
        return self.weights + self.overhead

    @property
    def total(self) -> int:
        """Bytes taken in all; fits when at most the budget."""
        return self.fixed + self.kv


def make_request(**asked: Any) -> Request:
    """A Request from plain values. Raises SizingError naming the first field that is wrong."""
    try:
        return Request(**asked)
    except ValidationError as problem:
        first = problem.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise SizingError(
            f"{field}: {first['input']!r} is not usable: {first['msg']}", field=field, value=first["input"]
        ) from problem


def weight_bytes(model: ModelFacts, precision: Precision | None = None) -> int:
    """Bytes of all weights at that precision (None: the model's own), over all ranks together.

    Files on disk count as they are. A published native format counts with its files' size where that is sourced, or
    by what its configuration says of each layer; otherwise linear layers shrink and embeddings, lm_head, norms,
    routers and vision stay 16-bit.
    Raises SizingError where the facts are missing or the files hold another precision.
    """
    wanted = precision or model.native_precision
    as_published = model.native_bytes if model.file_bytes is None else model.file_bytes
    if as_published is not None and (wanted is None or wanted == model.native_precision):
        return as_published
    if model.from_files and model.native_precision not in ("bf16", "fp16", "fp32"):
        raise SizingError(
            f"{model.id}: the files hold {model.native_precision}, they cannot be served as {wanted}",
            field="precision",
            value=wanted,
            remedy=f"leave precision out to use {model.native_precision}, or convert the files",
        )
    if wanted is None or wanted not in BYTES_PER_LINEAR_PARAMETER:
        raise not_sized(model)
    if model.linear_params is None or model.other_params is None:
        raise not_sized(model)
    linear = model.linear_params * BYTES_PER_LINEAR_PARAMETER[wanted]
    return int(linear + model.other_params * SIXTEEN_BIT_BYTES)


def lora_bytes(model: ModelFacts, slots: int, rank: int) -> int:
    """Bytes of `slots` resident adapters on each rank: rank * (inputs + outputs) of every linear layer.

    Counted unsharded (a rank never holds more). Experts get no adapter: with a mixture of experts only
    attention counts. Raises SizingError for layers unlike Llama's (MLA, linear attention, heads of their own), whose
    adapter layout is not established here.
    """
    if not slots:
        return 0
    shape = shape_of(model, 1)
    if not shape.plain:
        kind = "latent attention (MLA)" if shape.mla is not None else f"the layers of a {model.architecture}"
        raise SizingError(
            f"{model.id}: adapter sizes for {kind} are not established",
            field="lora_slots",
            value=slots,
            remedy="ask for 0 slots",
        )
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = 2 * (shape.hidden + query) + 2 * (shape.hidden + key)
    if shape.experts is None:
        widths += 3 * (shape.hidden + shape.ffn)
    return slots * rank * shape.layers * widths * SIXTEEN_BIT_BYTES


@lru_cache(maxsize=65536)
def demand(model: ModelFacts, request: Request) -> Demand:
    """What each rank's device must hold, in bytes. Integers, so a planner can add them up exactly."""
    shape_of(model, request.tp)
    _check_context(model, request.context)
    if request.engine == "llama_cpp":
        llama_cpp.check_request(model, request)
        weights, overhead = weight_bytes(model), llama_cpp.overhead_bytes(model)
    else:
        weights = -(-weight_bytes(model, request.precision) // request.tp)
        overhead = int(weights * WEIGHT_OVERHEAD) + RUNTIME_OVERHEAD_BYTES
    overhead += lora_bytes(model, request.lora_slots, request.lora_rank)
    per_sequence = _sequence(model, request, request.context)
    return Demand(weights, overhead, per_sequence, per_sequence * request.concurrency)


def budget_bytes(device_memory_bytes: int, utilization: float = DEFAULT_UTILIZATION) -> int:
    """Bytes an engine may take of a device that reports device_memory_bytes."""
    return int(device_memory_bytes * utilization)


def fit(model: ModelFacts, device_memory_bytes: int, request: Request | None = None, **asked: Any) -> Fit | DoesNotFit:
    """Whether `model` fits devices of that size (what each reports, bytes), as `request` asks.

    `asked` are Request's fields, for callers who write them inline. Alternatives are left empty: see
    alternatives.size_on. Raises SizingError for unknown facts or impossible requests.
    """
    request = request or make_request(**asked)
    need = demand(model, request)
    budget = budget_bytes(device_memory_bytes, request.utilization)
    room = budget - need.fixed
    spare = budget - need.total
    numbers: dict[str, Any] = {
        "model": model.id,
        "precision": _served_as(model, request),
        **request.model_dump(include={"engine", "context", "concurrency", "tp", "kv_dtype", "utilization"}),
        "weights_gib": gib(need.weights),
        "kv_bytes_per_token": kv_bytes_per_token(model, request.kv_dtype, request.tp),
        "kv_gib": gib(need.kv),
        "overhead_gib": gib(need.overhead),
        "budget_gib": gib(budget),
        # Both rounded against us: a refusal never says "by 0", a fit never promises more than there is.
        "headroom_gib": math.floor(spare / GIB * 1000) / 1000,
        "shortfall_gib": math.ceil(max(0, -spare) / GIB * 1000) / 1000,
        "max_concurrency": max(0, room // need.kv_per_sequence),
        "max_context": max_context(model, request, room),
        "max_num_batched_tokens": request.max_num_batched_tokens,
        "context_limit": model.max_positions,
        "notes": (*model.notes, *limit_notes(model), *_precision_note(model, request), *_state_note(model, request)),
    }
    return Fit(**numbers) if spare >= 0 else DoesNotFit(**numbers)


def default_context(model: ModelFacts) -> int:
    """Tokens per sequence where nobody asks for a number: 8192, or what the model was made for, if that is less."""
    return min(DEFAULT_CONTEXT, model.max_positions or DEFAULT_CONTEXT)


def limit_notes(model: ModelFacts) -> tuple[str, ...]:
    """What must be said of the longest context: that it is unknown, or which rope scaling it counts on."""
    if model.max_positions is None:
        return ("context limit unknown: the longest context this model was made for is not sourced",)
    if model.rope_scaling is None:
        return ()
    return (f"the context limit of {model.max_positions} tokens is its configuration's, with {model.rope_scaling}",)


def _served_as(model: ModelFacts, request: Request) -> str:
    """llama.cpp serves what the file holds, whatever word was used for it."""
    asked = None if request.engine == "llama_cpp" else request.precision
    return asked or model.native_precision or "unknown"


def _precision_note(model: ModelFacts, request: Request) -> tuple[str, ...]:
    precision = None if request.engine == "llama_cpp" else request.precision
    if precision is None or precision == model.native_precision or precision in ("bf16", "fp16"):
        return ()
    return (f"sized as {precision}: whether such a checkpoint is published is not known here",)


def _state_note(model: ModelFacts, request: Request) -> tuple[str, ...]:
    held = 0 if request.engine == "llama_cpp" else state_bytes_per_sequence(model, request.kv_dtype, request.tp)
    if not held:
        return ()
    return (f"a sequence keeps {gib(held)} GiB of linear attention's states, however short it is",)


def max_context(model: ModelFacts, request: Request, room_bytes: int) -> int:
    """Most tokens per sequence such that `concurrency` sequences fit room_bytes: whole blocks, or 0."""
    ceiling = model.max_positions or CONTEXT_CEILING_TOKENS
    low, high = 0, -(-ceiling // KV_BLOCK_TOKENS)
    while low < high:
        middle = (low + high + 1) // 2
        if _sequence(model, request, middle * KV_BLOCK_TOKENS) * request.concurrency <= room_bytes:
            low = middle
        else:
            high = middle - 1
    return min(low * KV_BLOCK_TOKENS, ceiling)


def _sequence(model: ModelFacts, request: Request, context: int) -> int:
    if request.engine == "llama_cpp":
        return context * llama_cpp.bytes_per_cell(model)
    return kv_bytes_per_sequence(
        model,
        context,
        kv_dtype=request.kv_dtype,
        tp=request.tp,
        encoder_tokens=request.encoder_tokens,
        max_num_batched_tokens=request.max_num_batched_tokens,
    )


def _check_context(model: ModelFacts, context: int) -> None:
    if model.max_positions is not None and context > model.max_positions:
        raise SizingError(
            f"{model.id}: context {context} is more than the {model.max_positions} positions it was made for",
            field="context",
            value=context,
            remedy=f"ask for at most {model.max_positions}; rope scaling counts only where a config.json states it",
        )
