"""What a family of decoders has other than Llama's, and the parts that most families share.

Layouts are those of the families' classes in huggingface/transformers (`models/<family>/modeling_<family>.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from aim_profile.errors import ModelError

from . import layouts, modules
from .config_fields import Config, latent_attention
from .facts import Attention
from .modules import Module, Routed, small

GATED = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")


class Family(NamedTuple):
    """What a family adds to, or has other than, a Llama layer.

    attention: its groups of layers; each: of what kind a layer is, for `mixer` and `feed`, which give the modules of a
    layer; predicts: of what kind a layer that predicts a further token is, None: not established; qk_norm: over each
    head or over all of them; gate: on attention's output, from a second half of the query; qkv_bias: whether it has
    one anyway; output_bias: attention_bias is of its output too; plain_bias: a feed-forward part without a gate, biases
    everywhere, norms too; norms: of the hidden width, a layer; at: where layers stand; moe: where experts do; parts:
    their matrices; router_bias: a value an expert beside the router.
    """

    attention: Callable[[Config], tuple[Attention, ...]] = layouts.full_or_window
    each: Callable[[Config], list[Any]] = layouts.kinds
    predicts: Any = None
    mixer: Callable[[Walk, int, str], Iterator[Module]] | None = None
    feed: Callable[[Walk, int, str], Iterator[Module]] | None = None
    qk_norm: Literal["", "head", "width"] = ""
    gate: bool = False
    qkv_bias: bool = False
    output_bias: bool = True
    plain_bias: bool = False
    sinks: bool = False
    norms: int = 2
    at: str = "model.layers"
    moe: str = "mlp"
    parts: tuple[str, ...] = GATED
    router_bias: bool = False
    expert_bias: bool = False
    shared: str = "shared_experts"
    shared_gate: bool = False


class Walk(NamedTuple):
    """One configuration; of each layer, and last of one that predicts, its kind and whether it has experts."""

    config: Config
    family: Family
    each: list[Any]
    sparse: list[bool]
    moe: Routed | None

    @property
    def hidden(self) -> int:
        return self.config.required("hidden_size")


def routed_experts(config: Config) -> Routed | None:
    """The mixture of experts under any of the names the families use, None for a dense model."""
    counts = (
        config.integer(key) for key in ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
    )
    if not (count := next((found for found in counts if found), None)):
        return None
    per_token = (
        config.integer(key) for key in ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k")
    )
    ffn = config.integer("moe_intermediate_size") or config.required("intermediate_size")
    shares = (config.integer(key) for key in ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"))
    shared = next((found for found in shares if found), 0) * ffn
    for key in ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"):
        if config.integer(key) is not None:
            shared = config.integer(key) or 0
    latent = config.integer("moe_latent_size") or config.integer("routed_expert_hidden_size")
    return Routed(count, next((found for found in per_token if found), 1), ffn, shared, latent)


def layer_modules(model: Walk, layer: int) -> Iterator[Module]:
    at = f"{model.family.at}.{layer}"
    yield from (model.family.mixer or attention_modules)(model, layer, at)
    yield from (model.family.feed or feed_forward)(model, layer, at)
    yield small(f"{at}.norms", model.family.norms * model.hidden)


def attention_modules(model: Walk, layer: int, at: str) -> Iterator[Module]:
    config, heads = model.config, model.config.required("num_attention_heads")
    width = config.integer("head_dim") or model.hidden // heads
    yield from projections(
        model, f"{at}.self_attn", (heads, config.integer("num_key_value_heads") or heads, width, width)
    )
    if model.family.sinks:
        yield small(f"{at}.self_attn.sinks", heads)


def projections(model: Walk, at: str, dims: tuple[int, int, int, int]) -> Iterator[Module]:
    """dims: query heads, key-value heads, dimension of a key, of a value."""
    (heads, keys, width, value), family = dims, model.family
    query = heads * width * (2 if family.gate else 1)
    yield from modules.grouped_query(at, model.hidden, query, keys * width, keys * value, heads * value)
    biased = model.config.text.get("attention_bias") is True or family.plain_bias
    if biased or family.qkv_bias:
        yield small(f"{at}.qkv_bias", query + keys * (width + value))
    yield small(f"{at}.o_bias", model.hidden if biased and family.output_bias else 0)
    if family.qk_norm and model.config.text.get("use_qk_norm") is not False:
        yield small(f"{at}.qk_norm", 2 * width if family.qk_norm == "head" else (heads + keys) * width)


def feed_forward(model: Walk, layer: int, at: str) -> Iterator[Module]:
    if model.moe is None or not model.sparse[layer]:
        ffn = model.config.integer("dense_intermediate_size") or model.config.required("intermediate_size")
        feed = modules.plain if model.family.plain_bias else modules.gated
        yield from feed(f"{at}.mlp", model.hidden, ffn)
        yield small(f"{at}.mlp.bias", ffn + model.hidden if model.family.plain_bias else 0)
    else:
        yield from experts(model, model.moe, f"{at}.{model.family.moe}")


def experts(model: Walk, moe: Routed, at: str) -> Iterator[Module]:
    family = model.family
    yield from modules.routed(at, model.hidden, moe, family.parts)
    if moe.shared:
        feed = modules.gated if len(family.parts) == len(GATED) else modules.plain
        yield from feed(f"{at}.{family.shared}", model.hidden, moe.shared)
    if family.shared_gate:
        yield small(f"{at}.{family.shared}_gate", model.hidden)
    yield small(f"{at}.gate.bias", moe.experts if family.router_bias else 0)
    if family.expert_bias:
        each = 2 * moe.ffn + model.hidden
        yield Module(f"{at}.experts.bias", moe.experts * each, linear=False, used=moe.per_token * each)


def latent(model: Walk, layer: int, at: str) -> Iterator[Module]:
    """Latent attention; each: whether the layer has an indexer."""
    config = model.config
    if (mla := latent_attention(config)) is None:
        raise ModelError(f"{config.file}: kv_lora_rank is missing or 0", field="kv_lora_rank")
    yield from modules.latent(f"{at}.self_attn", model.hidden, config.required("num_attention_heads"), mla)
    if model.each[layer] is True:
        heads, width = config.required("index_n_heads"), config.required("index_head_dim")
        yield from modules.indexer(f"{at}.self_attn", model.hidden, mla.query_rank or model.hidden, heads, width)
