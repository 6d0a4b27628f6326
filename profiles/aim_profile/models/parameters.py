"""How many parameters a decoder of a given shape has, split by what quantisation may shrink.

Counted as the Hugging Face implementations lay them out; checked against published file sizes
(Llama-3.1-8B 14.96 GiB, Llama-3.3-70B 131.42 GiB, gemma-3-4b 8.01 GiB) in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .facts import Shape

# Bytes per parameter: int4 with group scales, nvfp4 with a byte per 16 values, the OCP MX formats with one per 32.
BYTES_PER_LINEAR_PARAMETER: Mapping[str, float] = {
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.53,
    "nvfp4": 0.5625,
    "mxfp4": 0.53125,
    "mxfp6": 0.78125,
    "mxfp8": 1.03125,
}
SIXTEEN_BIT_BYTES = 2

# What each family adds to the plain Llama layer, from the models' own code.
_QKV_BIAS = {"qwen2", "qwen2_moe"}
_QK_NORM = {"qwen3", "qwen3_moe", "gemma3", "gemma3_text"}
_NORMS_PER_LAYER = {"gemma2": 4, "gemma3": 4, "gemma3_text": 4, "cohere": 1, "cohere2": 1}


class Parameters(NamedTuple):
    """linear: weights of linear layers, which quantisation shrinks; other: all that stays 16-bit."""

    linear: int
    other: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.linear + self.other


def count_parameters(architecture: str, shape: Shape) -> Parameters:
    """Parameters of that shape. Embeddings, lm_head, norms, biases, routers and vision are `other`."""
    sparse_layers = shape.layers - shape.experts.dense_layers if shape.experts else 0
    routers = sparse_layers * shape.experts.count * shape.hidden if shape.experts else 0
    linear = (
        shape.layers * _total(_attention_modules(shape))
        + (shape.layers - sparse_layers) * _total(_dense_modules(shape))
        + sparse_layers * _total(_expert_modules(shape))
    )
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    other = embeddings + shape.hidden + shape.layers * _small(architecture, shape) + routers
    return Parameters(linear, other + shape.vision_params)


def expert_parameters(shape: Shape) -> int:
    """Of all routed experts, working or not."""
    if shape.experts is None:
        return 0
    one = len(_FEED_FORWARD) * shape.hidden * shape.experts.ffn
    return (shape.layers - shape.experts.dense_layers) * shape.experts.count * one


def active_parameters(counted: Parameters, shape: Shape) -> int:
    """Of these, those that work on one token: without experts it does not reach, nor the embedding of other tokens."""
    experts = expert_parameters(shape)
    idle = experts - experts // shape.experts.count * shape.experts.per_token if shape.experts else 0
    embedding = 0 if shape.tied else (shape.vocab - 1) * shape.hidden
    return counted.total - shape.vision_params - idle - embedding


def linear_modules(shape: Shape) -> Iterator[tuple[str, int]]:
    """(name, parameters) of each linear layer of the decoder, named as Llama's and DeepSeek's code names them.

    All experts of a layer stand under the name of its first: no format is known to treat them differently.
    """
    attention, dense, sparse = (tuple(f(shape)) for f in (_attention_modules, _dense_modules, _expert_modules))
    first_sparse = shape.experts.dense_layers if shape.experts else shape.layers
    for layer in range(shape.layers):
        for name, parameters in (*attention, *(dense if layer < first_sparse else sparse)):
            yield f"model.layers.{layer}.{name}", parameters


_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def _total(modules: Iterator[tuple[str, int]]) -> int:
    return sum(parameters for _, parameters in modules)


def _dense_modules(shape: Shape) -> Iterator[tuple[str, int]]:
    yield from ((f"mlp.{part}", shape.hidden * shape.ffn) for part in _FEED_FORWARD)


def _attention_modules(shape: Shape) -> Iterator[tuple[str, int]]:
    hidden, mla = shape.hidden, shape.mla
    if mla is None:
        query, key = hidden * shape.heads * shape.head_dim, hidden * shape.kv_heads * shape.head_dim
        yield from (("self_attn.q_proj", query), ("self_attn.k_proj", key))
        yield from (("self_attn.v_proj", key), ("self_attn.o_proj", query))
        return
    query_width = shape.heads * (mla.nope_dim + mla.rope_dim)
    if mla.query_rank is None:
        yield "self_attn.q_proj", hidden * query_width
    else:
        yield "self_attn.q_a_proj", hidden * mla.query_rank
        yield "self_attn.q_b_proj", mla.query_rank * query_width
    yield "self_attn.kv_a_proj_with_mqa", hidden * (mla.kv_rank + mla.rope_dim)
    yield "self_attn.kv_b_proj", mla.kv_rank * shape.heads * (mla.nope_dim + mla.value_dim)
    yield "self_attn.o_proj", shape.heads * mla.value_dim * hidden


def _expert_modules(shape: Shape) -> Iterator[tuple[str, int]]:
    if shape.experts is None:
        return
    one = shape.hidden * shape.experts.ffn
    for part in _FEED_FORWARD:
        yield f"mlp.experts.0.{part}", shape.experts.count * one
        if shape.experts.shared:
            yield f"mlp.shared_experts.{part}", shape.experts.shared * one


def _small(architecture: str, shape: Shape) -> int:
    """Norms and biases of one layer."""
    norms = _NORMS_PER_LAYER.get(architecture, 2) * shape.hidden
    if shape.mla is not None:
        norms += shape.mla.kv_rank + (shape.mla.query_rank or 0)
    if architecture in _QK_NORM:
        norms += 2 * shape.head_dim
    if architecture in _QKV_BIAS:
        norms += (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return norms
