"""How many parameters a decoder of a given shape has, split by what quantisation may shrink.

Counted as the Hugging Face implementations lay them out; checked against published file sizes
(Llama-3.1-8B 14.96 GiB, Llama-3.3-70B 131.42 GiB, gemma-3-4b 8.01 GiB) in the tests.
"""

from __future__ import annotations

from typing import NamedTuple

from .facts import Shape

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
    dense, expert_linear, routers = _feed_forward(shape)
    linear = shape.layers * _attention_linear(shape) + dense + expert_linear
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    other = embeddings + shape.hidden + shape.layers * _small(architecture, shape) + routers
    return Parameters(linear, other + shape.vision_params)


def _attention_linear(shape: Shape) -> int:
    if shape.mla is None:
        query = shape.heads * shape.head_dim
        return shape.hidden * (2 * query + 2 * shape.kv_heads * shape.head_dim)
    mla = shape.mla
    query_width = shape.heads * (mla.nope_dim + mla.rope_dim)
    rank = mla.query_rank
    query = shape.hidden * query_width if rank is None else rank * (shape.hidden + query_width)
    latent = shape.hidden * (mla.kv_rank + mla.rope_dim)
    expand = mla.kv_rank * shape.heads * (mla.nope_dim + mla.value_dim)
    return query + latent + expand + shape.heads * mla.value_dim * shape.hidden


def _feed_forward(shape: Shape) -> tuple[int, int, int]:
    """Parameters of (dense layers, experts, routers), all layers together."""
    if shape.experts is None:
        return shape.layers * 3 * shape.hidden * shape.ffn, 0, 0
    experts = shape.experts
    sparse_layers = shape.layers - experts.dense_layers
    one = 3 * shape.hidden * experts.ffn
    return (
        experts.dense_layers * 3 * shape.hidden * shape.ffn,
        sparse_layers * (experts.count + experts.shared) * one,
        sparse_layers * experts.count * shape.hidden,
    )


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
