"""The KV cache: bytes of one token and of one sequence on each tensor-parallel rank, by kind of layer.

The formulas are the models' own cache layouts as vLLM allocates them (vllm-project/vllm vllm/v1/kv_cache_interface.py;
the tests ask those classes): blocks of 16 tokens; windowed layers after SlidingWindowSpec and
ChunkedLocalAttentionSpec; states of linear attention after MambaSpec, two pages a layer and sequence. A model that has
both attends in blocks of so many tokens that a page holds a state, and pads the state to it
(vllm/platforms/interface.py, _align_hybrid_block_size). What vLLM adds to make its groups of layers equally long is not
counted.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from aim_profile.errors import SizingError
from aim_profile.models.facts import Attention, ModelFacts, Shape, State

KvDtype = Literal["auto", "bf16", "fp16", "fp8"]

KV_DTYPE_BYTES: dict[str, int] = {"auto": 2, "bf16": 2, "fp16": 2, "fp8": 1}
KV_BLOCK_TOKENS = 16
# Kernels of latent attention want blocks of a multiple of so many tokens beside states.
_MLA_BLOCK_STEP = 128
_CONV_BYTES = 2


class _Cache(NamedTuple):
    """One cache of one layer: page_bytes for each block of `tokens`; window None: it grows with the context."""

    page_bytes: int
    tokens: int = KV_BLOCK_TOKENS
    window: int | None = None


def kv_bytes_per_token(model: ModelFacts, kv_dtype: KvDtype = "auto", tp: int = 1) -> int:
    """Bytes one more token costs each rank while no window is full: every self-attention layer counts.

    GQA and MHA: layers * (kv_heads / tp, at least 1) * (key + value dimension) * bytes. MLA: layers * (kv_rank +
    rope_dim) * bytes on every rank. An indexer's keys beside either, in their own format, on every rank. DeepSeek-V4:
    what a token adds to its compressed caches. States cost nothing here.
    Raises SizingError for unknown facts or a tp that does not divide.
    """
    shape = shape_of(model, tp)
    return sum(group.layers * _bytes_per_token(shape, group, kv_dtype, tp) for group in shape.attention)


def kv_bytes_per_sequence(
    model: ModelFacts,
    context: int,
    *,
    kv_dtype: KvDtype = "auto",
    tp: int = 1,
    encoder_tokens: int = 0,
    max_num_batched_tokens: int | None = None,
) -> int:
    """Bytes one sequence of `context` tokens holds on each rank, in whole blocks.

    Sliding and chunked layers hold their window and the tokens of the step being computed, never more than `context`;
    max_num_batched_tokens None: the window alone, as model papers count. Cross-attention layers hold encoder_tokens,
    linear ones their state.
    """
    shape = shape_of(model, tp)
    block = _block_tokens(shape, kv_dtype, tp)
    held = 0
    for group in shape.attention:
        tokens = encoder_tokens if group.kind == "cross" else context
        caches = _caches(shape, group, kv_dtype, tp, block)
        each = sum(cache.page_bytes * _blocks(cache, tokens, group, max_num_batched_tokens) for cache in caches)
        held += group.layers * (each + _state(shape, group, kv_dtype, tp, block))
    return held


def state_bytes_per_sequence(model: ModelFacts, kv_dtype: KvDtype = "auto", tp: int = 1) -> int:
    """Bytes that layers of linear attention keep of a sequence on each rank, however short it is; 0 without any.

    Raises SizingError as shape_of does.
    """
    shape = shape_of(model, tp)
    block = _block_tokens(shape, kv_dtype, tp)
    return sum(group.layers * _state(shape, group, kv_dtype, tp, block) for group in shape.attention)


def shape_of(model: ModelFacts, tp: int) -> Shape:
    """The dimensions, of a model that is sized and that tp divides. Raises SizingError."""
    shape = model.shape
    if shape is None or model.missing:
        raise not_sized(model)
    heads, kv_heads = shape.heads, shape.kv_heads
    states = [group.state.heads for group in shape.attention if group.state is not None]
    kept = [group.kv_heads or kv_heads for group in shape.attention if shape.mla is None and group.kind != "linear"]
    if any(count % tp for count in (heads, *states)) or any(count % tp and tp % count for count in kept):
        raise SizingError(
            f"{model.id}: tensor parallel {tp} does not divide {heads} heads ({kv_heads} key-value heads"
            + (f", {states[0]} of linear attention)" if states else ")"),
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


def _bytes_per_token(shape: Shape, group: Attention, kv_dtype: KvDtype, tp: int) -> int:
    """Of one layer, in each rank's cache."""
    if group.kind in ("cross", "shared", "linear"):
        return 0
    if group.kind == "compressed":
        caches = _compressed(group, KV_BLOCK_TOKENS)
        return sum(-(-cache.page_bytes // cache.tokens) for cache in caches if cache.window is None)
    return _kept(shape, group, kv_dtype, tp)


def _kept(shape: Shape, group: Attention, kv_dtype: KvDtype, tp: int) -> int:
    """Keys and values of one token in one layer, and its indexer's key."""
    width = KV_DTYPE_BYTES[kv_dtype]
    if shape.mla is not None:
        return (shape.mla.kv_rank + shape.mla.rope_dim) * width + group.index_bytes
    key = group.key_dim or shape.head_dim
    heads = max(1, (group.kv_heads or shape.kv_heads) // tp)
    return heads * (key + (group.value_dim or key)) * width + group.index_bytes


def _caches(shape: Shape, group: Attention, kv_dtype: KvDtype, tp: int, block: int) -> tuple[_Cache, ...]:
    if group.kind in ("shared", "linear"):
        return ()
    if group.kind == "compressed":
        return _compressed(group, block)
    return (_Cache(_kept(shape, group, kv_dtype, tp) * block, block, group.window),)


# DeepSeek-V4 after vLLM's fp8_ds_mla layout, the one it takes unless told otherwise (vllm/models/deepseek_v4):
# a latent is 448 fp8 values, 64 rotary ones at 16 bits and 8 bytes of scales; pages end at multiples of 576 bytes.
_LATENT_BYTES = 584
_PAGE_ALIGNMENT = 576
_COMPRESSED_BLOCK, _WINDOW_BLOCK = 256, 64


def _compressed(group: Attention, block: int) -> tuple[_Cache, ...]:
    """A layer's recent latents, its compressed ones, the unfinished group being compressed (fp32), and its indexer's.

    ratio 4 keeps two overlapping groups; only it has an indexer, of keys of index_bytes (fp8 and a scale of 4 bytes
    for 128 values).
    """
    recent = _Cache(_page(_WINDOW_BLOCK * _LATENT_BYTES), _WINDOW_BLOCK, group.window)
    ratio, latent = group.ratio or 1, group.key_dim or 0
    if ratio == 1:
        return (recent,)
    states = _COMPRESSED_BLOCK // ratio
    overlap = 2 if ratio == 4 else 1
    rows = 4 if ratio == 4 else 8
    widths = [(_LATENT_BYTES, latent)]
    if group.index_bytes:
        widths.append((group.index_bytes, group.index_bytes * 32 // 33))
    grown = (_Cache(_page(states * stored), _COMPRESSED_BLOCK) for stored, _ in widths)
    unfinished = (_Cache(_page(rows * 2 * overlap * values * 4), rows, overlap * ratio) for _, values in widths)
    return recent, *grown, *unfinished


def _page(size: int) -> int:
    return -(-size // _PAGE_ALIGNMENT) * _PAGE_ALIGNMENT


def _block_tokens(shape: Shape, kv_dtype: KvDtype, tp: int) -> int:
    """Tokens of a block: 16, or with states beside attention the fewest whose page holds one state."""
    states = [_state_bytes(group.state, tp) for group in shape.attention if group.state is not None]
    kept = [_bytes_per_token(shape, group, kv_dtype, tp) for group in shape.attention if group.kind == "full"]
    if not states or not kept:
        return KV_BLOCK_TOKENS
    step = KV_BLOCK_TOKENS if shape.mla is None else _MLA_BLOCK_STEP
    return step * -(-max(states) // (step * max(kept)))


def _state(shape: Shape, group: Attention, kv_dtype: KvDtype, tp: int, block: int) -> int:
    """Bytes of one layer's states of a sequence, each padded to the page of the attention beside it: the newest, that
    of the last block others may begin from (prefix caching, which vLLM turns on where attention stands beside), and
    the family's checkpoints.
    """
    if group.state is None:
        return 0
    kept = [_bytes_per_token(shape, other, kv_dtype, tp) for other in shape.attention if other.kind == "full"]
    page = max(_state_bytes(group.state, tp), block * max(kept, default=0))
    return page * ((2 if kept else 1) + group.state.checkpoints)


def _state_bytes(state: State, tp: int) -> int:
    """After vLLM's MambaStateShapeCalculator: groups that tp does not divide are repeated until it does."""
    groups = state.groups if state.groups % tp == 0 else tp
    conv = state.conv_rows * ((state.conv_channels + groups * state.group_channels) // tp)
    return conv * _CONV_BYTES + state.recurrent // tp * state.recurrent_bytes


def _blocks(cache: _Cache, tokens: int, group: Attention, step_tokens: int | None) -> int:
    """Blocks one layer holds of one sequence while it is being prefilled, the most it ever holds."""
    if cache.window is None:
        return -(-tokens // cache.tokens)
    if step_tokens is None:
        return -(-min(tokens, cache.window) // cache.tokens)
    if group.kind == "chunked":
        return -(-min(tokens, cache.window + step_tokens) // cache.tokens)
    # One block more: a window need not begin where a block does.
    return -(-min(tokens, cache.window - 1 + step_tokens) // cache.tokens) + 1
