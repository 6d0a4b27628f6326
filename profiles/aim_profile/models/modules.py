"""Weights of a decoder, part by part: how many parameters each has, and under which name checkpoints keep it.

Names are the checkpoints' own, without what a multimodal model puts before them, since quantisers name parts by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .facts import Mla


class Module(NamedTuple):
    """linear: a linear layer, which quantisation shrinks unless it says otherwise; used: how many of the parameters
    work on one token, None: all of them.
    """

    name: str
    parameters: int
    linear: bool = True
    used: int | None = None

    @property
    def active(self) -> int:
        """Parameters that work on one token."""
        return self.parameters if self.used is None else self.used


class Routed(NamedTuple):
    """A mixture of experts as it is built: of `experts` `per_token` work, each of `ffn` inner values.

    latent: experts work at that width, with a projection before and after; shared: inner values of what always works.
    """

    experts: int
    per_token: int
    ffn: int
    shared: int = 0
    latent: int | None = None


def small(name: str, parameters: int) -> Module:
    """Norms, biases, routers: what stays at 16 bits. Their active share is all of them."""
    return Module(name, parameters, linear=False)


def total(modules: Iterable[Module]) -> int:
    """Parameters of them all."""
    return sum(module.parameters for module in modules)


def grouped_query(at: str, hidden: int, query: int, key: int, value: int, output: int) -> Iterator[Module]:
    """Projections of grouped-query attention; widths in values: query heads × key dimension, and so on."""
    for name, width in (("q", query), ("k", key), ("v", value)):
        if width:
            yield Module(f"{at}.{name}_proj", hidden * width)
    yield Module(f"{at}.o_proj", output * hidden)


def latent(at: str, hidden: int, heads: int, mla: Mla) -> Iterator[Module]:
    """Projections of multi-head latent attention and the norms of its ranks."""
    width = heads * (mla.nope_dim + mla.rope_dim)
    if mla.query_rank is None:
        yield Module(f"{at}.q_proj", hidden * width)
    else:
        yield Module(f"{at}.q_a_proj", hidden * mla.query_rank)
        yield Module(f"{at}.q_b_proj", mla.query_rank * width)
    yield Module(f"{at}.kv_a_proj_with_mqa", hidden * (mla.kv_rank + mla.rope_dim))
    yield Module(f"{at}.kv_b_proj", mla.kv_rank * heads * (mla.nope_dim + mla.value_dim))
    yield Module(f"{at}.o_proj", heads * mla.value_dim * hidden)
    yield small(f"{at}.norms", mla.kv_rank + (mla.query_rank or 0))


def gated(at: str, hidden: int, ffn: int) -> Iterator[Module]:
    """A feed-forward part with a gate."""
    yield from (Module(f"{at}.{part}_proj", hidden * ffn) for part in ("gate", "up", "down"))


def plain(at: str, hidden: int, ffn: int) -> Iterator[Module]:
    """A feed-forward part without one."""
    yield from (Module(f"{at}.{part}_proj", hidden * ffn) for part in ("up", "down"))


def routed(at: str, hidden: int, moe: Routed, parts: tuple[str, ...]) -> Iterator[Module]:
    """The experts of one layer (all under the name of the first) and their router; what is shared stands apart."""
    width = moe.latent or hidden
    for part in parts:
        one = width * moe.ffn
        yield Module(f"{at}.experts.0.{part}", moe.experts * one, used=moe.per_token * one)
    if moe.latent:
        yield Module(f"{at}.fc1_latent_proj", hidden * moe.latent)
        yield Module(f"{at}.fc2_latent_proj", hidden * moe.latent)
    yield small(f"{at}.gate", moe.experts * hidden)


def gated_delta(at: str, hidden: int, keys: int, values: int, heads: int, kernel: int) -> Iterator[Module]:
    """A gated delta net (Qwen3-Next, Qwen3.5); keys, values: heads × head dimension; heads: of values."""
    yield Module(f"{at}.in_proj_qkv", hidden * (2 * keys + values))
    yield Module(f"{at}.in_proj_z", hidden * values)
    yield Module(f"{at}.out_proj", values * hidden)
    yield small(f"{at}.in_proj_ba", 2 * hidden * heads)
    yield small(f"{at}.conv1d", (2 * keys + values) * kernel)
    yield small(f"{at}.norm", 2 * heads + values // heads)


def mamba2(at: str, hidden: int, inner: int, heads: int, groups: int, state: int, kernel: int) -> Iterator[Module]:
    """A Mamba-2 mixer, its convolution with a bias; inner: heads × head dimension; groups × state: of B and of C."""
    channels = inner + 2 * groups * state
    yield Module(f"{at}.in_proj", hidden * (inner + channels + heads))
    yield Module(f"{at}.out_proj", inner * hidden)
    yield small(f"{at}.conv1d", channels * (kernel + 1))
    yield small(f"{at}.norm", 3 * heads + inner)


def kimi_delta(at: str, hidden: int, heads: int, head_dim: int, kernel: int) -> Iterator[Module]:
    """Kimi's delta attention with a full-rank gate (Kimi-K3; vllm-project/vllm vllm/models/kimi_k3)."""
    width = heads * head_dim
    yield from (Module(f"{at}.{part}_proj", hidden * width) for part in ("q", "k", "v", "g", "o"))
    yield Module(f"{at}.f_a_proj", hidden * head_dim)
    yield Module(f"{at}.f_b_proj", head_dim * width)
    yield Module(f"{at}.b_proj", hidden * heads)
    yield small(f"{at}.conv1d", 3 * width * kernel)
    yield small(f"{at}.norm", width + heads + head_dim)


def indexer(at: str, hidden: int, query_rank: int, heads: int, head_dim: int) -> Iterator[Module]:
    """The indexer of DeepSeek-V3.2's sparse attention."""
    yield Module(f"{at}.indexer.wq_b", query_rank * heads * head_dim)
    yield Module(f"{at}.indexer.wk", hidden * head_dim)
    yield small(f"{at}.indexer.weights_proj", hidden * heads)
    yield small(f"{at}.indexer.k_norm", 2 * head_dim)
