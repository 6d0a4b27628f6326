"""The KV cache: bytes of one token and of one sequence on each tensor-parallel rank, by kind of layer.

The formulas are the models' own cache layouts as vLLM allocates them (blocks of 16 tokens; windowed layers after
SlidingWindowSpec and ChunkedLocalAttentionSpec, vllm-project/vllm@001cabc vllm/v1/kv_cache_interface.py).
"""

from __future__ import annotations

from typing import Literal

from aim_profile.errors import SizingError
from aim_profile.models.facts import Attention, ModelFacts, Shape

KvDtype = Literal["auto", "bf16", "fp16", "fp8"]

KV_DTYPE_BYTES: dict[str, int] = {"auto": 2, "bf16": 2, "fp16": 2, "fp8": 1}
KV_BLOCK_TOKENS = 16


def kv_bytes_per_token(model: ModelFacts, kv_dtype: KvDtype = "auto", tp: int = 1) -> int:
    """Bytes one more token costs each rank while no window is full: every self-attention layer counts.

    GQA and MHA: 2 * layers * (kv_heads / tp, at least 1) * head_dim * bytes. MLA: layers * (kv_rank +
    rope_dim) * bytes on every rank. Raises SizingError for unknown facts or a tp that does not divide.
    """
    shape = shape_of(model, tp)
    return shape.self_attention_layers * _bytes_per_token_and_layer(shape, kv_dtype, tp)


def kv_bytes_per_sequence(
    model: ModelFacts,
    context: int,
    *,
    kv_dtype: KvDtype = "auto",
    tp: int = 1,
    encoder_tokens: int = 0,
    max_num_batched_tokens: int | None = None,
) -> int:
    """Bytes one sequence of `context` tokens holds on each rank, in blocks of 16 tokens.

    Sliding and chunked layers hold their window and the tokens of the step being computed, never more than `context`;
    max_num_batched_tokens None: the window alone, as model papers count. Cross-attention layers hold encoder_tokens.
    """
    shape = shape_of(model, tp)
    block_bytes = _bytes_per_token_and_layer(shape, kv_dtype, tp) * KV_BLOCK_TOKENS
    return sum(
        group.layers * block_bytes * _blocks_held(group, context, encoder_tokens, max_num_batched_tokens)
        for group in shape.attention
    )


def shape_of(model: ModelFacts, tp: int) -> Shape:
    """The dimensions, of a model that is sized and that tp divides. Raises SizingError."""
    shape = model.shape
    if shape is None or model.missing:
        raise not_sized(model)
    heads, kv_heads = shape.heads, shape.kv_heads
    if heads % tp or (shape.mla is None and kv_heads % tp and tp % kv_heads):
        raise SizingError(
            f"{model.id}: tensor parallel {tp} does not divide {heads} heads ({kv_heads} key-value heads)",
            field="tp",
            value=tp,
            remedy="choose a divisor of both, or a multiple of the key-value heads",
        )
    return shape


def not_sized(model: ModelFacts) -> SizingError:
    """What to raise for a model of which too little is known, with what is missing."""
    missing = ", ".join(model.missing) or "its parameter counts"
    return SizingError(
        f"{model.id} is known, not sized: {missing}",
        field="model",
        value=model.id,
        remedy="point at a directory that holds its config.json and safetensors, or at a GGUF file",
    )


def _bytes_per_token_and_layer(shape: Shape, kv_dtype: KvDtype, tp: int) -> int:
    width = KV_DTYPE_BYTES[kv_dtype]
    if shape.mla is not None:
        return (shape.mla.kv_rank + shape.mla.rope_dim) * width
    return 2 * max(1, shape.kv_heads // tp) * shape.head_dim * width


def _blocks_held(group: Attention, context: int, encoder_tokens: int, step_tokens: int | None) -> int:
    """Blocks one layer holds of one sequence while it is being prefilled, the most it ever holds."""
    if group.kind == "cross":
        return _blocks(encoder_tokens)
    if group.window is None:
        return _blocks(context)
    if step_tokens is None:
        return _blocks(min(context, group.window))
    if group.kind == "chunked":
        return _blocks(min(context, group.window + step_tokens))
    # One block more: a window need not begin where a block does.
    return _blocks(min(context, group.window - 1 + step_tokens)) + 1


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK_TOKENS)
