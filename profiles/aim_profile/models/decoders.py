"""Decoders counted module by module from config.json: hybrids, sparse attention, mixtures with shared experts.

A family that is not here is not guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from . import layouts, mixers, modules
from .config_fields import Config
from .facts import Attention, Experts
from .family import NUMBERED, Family, Walk, latent, layer_modules, routed_experts
from .modules import Module, small


class Decoder(NamedTuple):
    """A decoder's weights, with embeddings and head. prediction: parameters of the layers that predict further tokens,
    None: there are some, of a layout that is not established.
    """

    attention: tuple[Attention, ...]
    modules: tuple[Module, ...]
    prediction: int | None


def read_decoder(config: Config) -> Decoder | None:
    """The decoder that a configuration describes, None for a family that is not known here.

    Raises ModelError where the configuration leaves out what its family needs.
    """
    family = FAMILIES.get(config.architecture)
    if family is None:
        return None
    model = Walk(
        config,
        family,
        [*family.each(config), family.predicts],
        [*_sparse(config), True],
        routed_experts(config),
    )
    hidden, vocabulary = model.hidden, config.required("vocab_size")
    held = [Module("model.embed_tokens", vocabulary * hidden, linear=False, used=None if config.tied else hidden)]
    if not config.tied:
        held.append(small("lm_head", vocabulary * hidden))
    for layer in range(layouts.layer_count(config)):
        held.extend(layer_modules(model, layer))
    held.append(small("model.norm", 2 * hidden if family.plain_bias else hidden))
    held.extend(_extras(config))
    return Decoder(family.attention(config), tuple(held), _prediction(model))


def experts_of(config: Config, attention: tuple[Attention, ...]) -> Experts | None:
    """The same as the facts have it; shared experts counted in widths of a routed one.

    Of a decoder whose feed-forward parts are layers of their own those that attend are the layers.
    """
    moe = routed_experts(config)
    if moe is None:
        return None
    layers = sum(group.layers for group in attention)
    return Experts(
        count=moe.experts,
        per_token=moe.per_token,
        shared=-(-moe.shared // moe.ffn),
        ffn=moe.ffn,
        dense_layers=max(0, layers - sum(_sparse(config))),
    )


def _sparse(config: Config) -> list[bool]:
    if config.architecture == "nemotron_h":
        return [block == "moe" for block in layouts.nemotron_blocks(config)]
    return layouts.sparse_layers(config)


def _extras(config: Config) -> Iterator[Module]:
    """What stands once beside the layers."""
    hidden = config.required("hidden_size")
    if own := (config.integer("hidden_size_per_layer_input") if config.architecture in _GEMMAS else None):
        layers, vocabulary = layouts.layer_count(config), config.required("vocab_size_per_layer_input")
        yield Module("model.embed_tokens_per_layer", vocabulary * layers * own, linear=False, used=layers * own)
        yield small("model.per_layer_model_projection", hidden * layers * own + own)
    if config.architecture == "kimi_k3" and config.integer("attn_res_block_size"):
        yield small("model.output_residuals", 2 * hidden)
    if streams := (config.integer("hc_mult") if config.architecture in _COMPRESSED else None):
        yield small("hc_head", streams * (streams * hidden + 1) + 1)


def _prediction(model: Walk) -> int | None:
    """Of layers that predict further tokens: each a decoder layer, three norms and a projection of two hidden states
    to one. Embedding and head are the model's, or copies of it in the files, which no engine loads twice.
    """
    config = model.config
    names = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
    count = next((found for name in names if (found := config.integer(name))), 0)
    if not count:
        return 0
    beside = 2 * model.hidden**2 + 3 * model.hidden
    if config.architecture == "nemotron_h":
        blocks = layouts.nemotron_prediction(config)
        held = [modules.total(mixers.nemotron_block(model, block, "mtp")) + model.hidden for block in blocks]
        return count * (beside + sum(held)) if held else None
    if model.family.predicts is None:
        return None
    return count * (beside + modules.total(layer_modules(model, len(model.each) - 1)))


_GEMMAS = ("gemma4", "gemma4_text")
_COMPRESSED = ("deepseek_v4", "deepseek_ref")
_DEEPSEEK = Family(
    attention=layouts.indexed_latent, each=layouts.indexed_layers, mixer=latent, router_bias=True, predicts=False
)
_SPARSE = _DEEPSEEK._replace(predicts=True)
_QWEN3 = Family(qk_norm="head")
_QWEN3_5 = Family(
    attention=layouts.gated_delta,
    mixer=mixers.gated_delta,
    qk_norm="head",
    gate=True,
    shared="shared_expert",
    predicts="full",
)
_MINIMAX_M3 = Family(
    attention=layouts.minimax_m3,
    each=layouts.minimax_sparse,
    mixer=mixers.minimax_m3,
    qk_norm="head",
    moe="block_sparse_moe",
    parts=NUMBERED,
    router_bias=True,
)
_GEMMA4 = Family(attention=layouts.gemma4, mixer=mixers.gemma4_attention, feed=mixers.gemma4_feed, norms=4)
_DEEPSEEK_V4 = Family(
    attention=layouts.compressed,
    each=layouts.ratios,
    mixer=mixers.compressed,
    feed=mixers.compressed_feed,
    at="layers",
    parts=NUMBERED,
)
_AS_LISTED = Family(attention=layouts.as_listed)
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("granite", "phi3"), _AS_LISTED),
    "olmo2": _AS_LISTED._replace(qk_norm="width"),
    "olmo3": Family(qk_norm="width"),
    "starcoder2": _AS_LISTED._replace(plain_bias=True, norms=4),
    "cohere2": _AS_LISTED._replace(norms=1),
    "qwen2_moe": _AS_LISTED._replace(qkv_bias=True, output_bias=False, shared="shared_expert", shared_gate=True),
    "qwen3_next": _QWEN3_5._replace(shared_gate=True),
    "glm4_moe": Family(qk_norm="head", output_bias=False, router_bias=True, predicts="full"),
    "ernie4_5": Family(),
    "ernie4_5_moe": Family(router_bias=True),
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "kimi_k25": _DEEPSEEK,
    "deepseek_v32": _SPARSE,
    "glm_moe_dsa": _SPARSE,
    "kimi_k3": Family(attention=layouts.kimi_delta, mixer=mixers.kimi_delta, feed=mixers.kimi_feed, router_bias=True),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5._replace(shared_gate=True),
    **dict.fromkeys(_GEMMAS, _GEMMA4),
    "gpt_oss": Family(sinks=True, router_bias=True, expert_bias=True),
    "minimax_m2": Family(qk_norm="width", moe="block_sparse_moe", parts=NUMBERED, router_bias=True),
    "minimax_m3": _MINIMAX_M3,
    "minimax_m3_vl": _MINIMAX_M3,
    "mimo": Family(output_bias=False, predicts="full"),
    "mimo_v2_flash": Family(
        attention=layouts.mimo_v2, mixer=mixers.mimo_attention, output_bias=False, router_bias=True
    ),
    "nemotron-nas": Family(
        attention=layouts.searched, each=layouts.searched_blocks, mixer=mixers.searched, feed=mixers.nothing, norms=0
    ),
    "nemotron_h": Family(
        attention=layouts.mamba2,
        each=layouts.nemotron_blocks,
        mixer=mixers.nemotron,
        feed=mixers.nothing,
        norms=1,
        at="backbone.layers",
        parts=("up_proj", "down_proj"),
        router_bias=True,
    ),
    **dict.fromkeys(_COMPRESSED, _DEEPSEEK_V4),
}
