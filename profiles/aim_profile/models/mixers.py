"""Layers unlike Llama's: linear attention, compressed attention, attention pruned by a search.

Layouts are those of the families' classes in huggingface/transformers; of Kimi-K3, and the names of DeepSeek-V4's
tensors, vllm-project/vllm's (vllm/models).
"""

from __future__ import annotations

from collections.abc import Iterator

from aim_profile.errors import ModelError

from . import layouts, modules
from .family import GATED, Walk, attention_modules, experts, feed_forward, latent, projections
from .modules import Module, small


def gated_delta(model: Walk, layer: int, at: str) -> Iterator[Module]:
    if model.each[layer] != "linear":
        yield from attention_modules(model, layer, at)
        return
    config = model.config
    keys = config.required("linear_num_key_heads") * config.required("linear_key_head_dim")
    heads = config.required("linear_num_value_heads")
    values, kernel = heads * config.required("linear_value_head_dim"), config.required("linear_conv_kernel_dim")
    yield from modules.gated_delta(f"{at}.linear_attn", model.hidden, keys, values, heads, kernel)


def gemma4_attention(model: Walk, layer: int, at: str) -> Iterator[Module]:
    """Full layers have their own heads, and one projection for keys and values; shared ones have neither."""
    config, heads = model.config, model.config.required("num_attention_heads")
    keys, width = config.required("num_key_value_heads"), config.required("head_dim")
    full = model.each[layer] == "full"
    if full:
        keys, width = layouts.gemma4_full_heads(config)
    own = layer < layouts.layer_count(config) - layouts.shared_layers(config)
    once = full and config.text.get("attention_k_eq_v") is True
    key, value = (keys * width if own else 0), (keys * width if own and not once else 0)
    yield from modules.grouped_query(f"{at}.self_attn", model.hidden, heads * width, key, value, heads * width)
    yield small(f"{at}.self_attn.qk_norm", 2 * width if own else width)


def gemma4_feed(model: Walk, layer: int, at: str) -> Iterator[Module]:
    """A dense part in every layer, and experts beside it; inputs of each layer's own where the model has them."""
    config, hidden = model.config, model.hidden
    shared = layouts.shared_layers(config)
    wide = config.text.get("use_double_wide_mlp") is True and layer >= layouts.layer_count(config) - shared > 0
    yield from modules.gated(f"{at}.mlp", hidden, config.required("intermediate_size") * (2 if wide else 1))
    yield small(f"{at}.layer_scalar", 1)
    if config.text.get("enable_moe_block") is True and model.moe:
        yield from modules.routed(at, hidden, model.moe, GATED)
        yield small(f"{at}.router.scales", 4 * hidden + model.moe.experts)
    if own := config.integer("hidden_size_per_layer_input"):
        yield Module(f"{at}.per_layer_input_gate", hidden * own)
        yield Module(f"{at}.per_layer_projection", hidden * own)
        yield small(f"{at}.post_per_layer_input_norm", hidden)


def mimo_attention(model: Walk, layer: int, at: str) -> Iterator[Module]:
    swa = "swa_" if model.each[layer] == "sliding" else ""
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim")
    heads, keys, width, value = (model.config.required(swa + name) for name in names)
    yield from projections(model, f"{at}.self_attn", (heads, keys, width, value))
    stated = model.config.text.get("add_swa_attention_sink_bias" if swa else "add_full_attention_sink_bias")
    yield small(f"{at}.self_attn.sinks", heads if stated is True else 0)


def minimax_m3(model: Walk, layer: int, at: str) -> Iterator[Module]:
    """Attention, with an indexer where the layer attends sparsely."""
    yield from attention_modules(model, layer, at)
    if model.each[layer]:
        width, heads = (
            layouts.sparse_setting(model.config, f"sparse_{key}") for key in ("index_dim", "num_index_heads")
        )
        yield Module(f"{at}.self_attn.index_q_proj", model.hidden * heads * width)
        yield Module(f"{at}.self_attn.index_k_proj", model.hidden * width)
        yield small(f"{at}.self_attn.index_norm", 2 * width)


def nemotron(model: Walk, layer: int, at: str) -> Iterator[Module]:
    """One block: a mixer or a feed-forward part, and one norm."""
    yield from nemotron_block(model, model.each[layer], f"{at}.mixer")


def nemotron_block(model: Walk, block: str, at: str) -> Iterator[Module]:
    config, hidden = model.config, model.hidden
    if block == "mamba":
        heads, groups = config.required("mamba_num_heads"), config.required("n_groups")
        inner, size = heads * config.required("mamba_head_dim"), config.required("ssm_state_size")
        yield from modules.mamba2(at, hidden, inner, heads, groups, size, config.required("conv_kernel"))
    elif block == "attention":
        heads, keys = config.required("num_attention_heads"), config.required("num_key_value_heads")
        width = config.integer("head_dim") or config.required("attention_head_dim")
        yield from projections(model, at, (heads, keys, width, width))
    elif block == "moe" and model.moe:
        yield from experts(model, model.moe, at)
    else:
        yield from modules.plain(at, hidden, config.required("intermediate_size"))


def nothing(model: Walk, layer: int, at: str) -> Iterator[Module]:
    yield from ()


def kimi_delta(model: Walk, layer: int, at: str) -> Iterator[Module]:
    """Delta attention, or latent attention with a gate on its output; attention over earlier blocks' residuals."""
    config = model.config
    if model.each[layer] == "linear":
        names = ("num_heads", "head_dim", "short_conv_kernel_size")
        heads, width, kernel = (config.whole_number(config.text.get("linear_attn_config"), name) for name in names)
        yield from modules.kimi_delta(f"{at}.self_attn", model.hidden, heads, width, kernel)
    else:
        yield from latent(model, layer, at)
        if config.text.get("mla_use_output_gate") is True:
            width = config.required("num_attention_heads") * config.required("v_head_dim")
            yield Module(f"{at}.self_attn.g_proj", model.hidden * width)
    if config.integer("attn_res_block_size"):
        yield small(f"{at}.residuals", 4 * model.hidden)


def kimi_feed(model: Walk, layer: int, at: str) -> Iterator[Module]:
    yield from feed_forward(model, layer, at)
    if model.moe and model.moe.latent and model.sparse[layer] and model.config.text.get("latent_moe_use_norm") is True:
        yield small(f"{at}.routed_expert_norm", model.moe.latent)


def searched(model: Walk, layer: int, at: str) -> Iterator[Module]:
    """What a search has left of a Llama layer."""
    (keys, ffn), heads = model.each[layer], model.config.required("num_attention_heads")
    width = model.config.integer("head_dim") or model.hidden // heads
    if keys:
        yield from projections(model, f"{at}.self_attn", (heads, keys, width, width))
    if ffn:
        yield from modules.gated(f"{at}.mlp", model.hidden, ffn)
    yield small(f"{at}.norms", (bool(keys) + bool(ffn)) * model.hidden)


def compressed(model: Walk, layer: int, at: str) -> Iterator[Module]:
    """DeepSeek-V4's attention: one latent for keys and values, its output in groups, a compressor, an indexer."""
    config, hidden = model.config, model.hidden
    heads, width, rank = (config.required(key) for key in ("num_attention_heads", "head_dim", "q_lora_rank"))
    groups, output = config.required("o_groups"), config.required("o_lora_rank")
    yield Module(f"{at}.attn.wq_a", hidden * rank)
    yield Module(f"{at}.attn.wq_b", rank * heads * width)
    yield Module(f"{at}.attn.wkv", hidden * width)
    yield Module(f"{at}.attn.wo_a", heads * width * output)
    yield Module(f"{at}.attn.wo_b", groups * output * hidden)
    yield small(f"{at}.attn.norms", rank + width + heads)
    ratio = model.each[layer]
    if ratio > 1:
        yield from _compressor(f"{at}.attn.compressor", hidden, width, ratio)
    if ratio == 4:
        index, asked = config.required("index_head_dim"), config.required("index_n_heads")
        yield Module(f"{at}.attn.indexer.wq_b", rank * asked * index)
        yield small(f"{at}.attn.indexer.weights_proj", hidden * asked)
        yield from _compressor(f"{at}.attn.indexer.compressor", hidden, index, ratio)
    streams = config.required("hc_mult")
    mixed = streams * (streams + 2)
    yield small(f"{at}.hyper_connections", 2 * (mixed * (streams * hidden + 1) + 3))


def _compressor(at: str, hidden: int, width: int, ratio: int) -> Iterator[Module]:
    wide = width * (2 if ratio == 4 else 1)
    yield small(f"{at}.wkv", 2 * hidden * wide)
    yield small(f"{at}.ape", ratio * wide + width)


def compressed_feed(model: Walk, layer: int, at: str) -> Iterator[Module]:
    """Experts in every layer; the first layers route by a table of the vocabulary instead of a bias."""
    if model.moe is None:
        raise ModelError(f"{model.config.file}: n_routed_experts is missing or 0", field="n_routed_experts")
    yield from experts(model, model.moe, f"{at}.ffn")
    if layer >= (model.config.integer("num_hash_layers") or 0):
        yield small(f"{at}.ffn.gate.bias", model.moe.experts)
