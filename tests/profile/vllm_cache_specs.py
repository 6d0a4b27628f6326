"""What vLLM's own KVCacheSpec classes say a sequence holds, of one configuration after another, in the vLLM lane.

Standard input is a JSON list of cases `{config, tp, context, step, fp8}`; standard output a list of their bytes. Each
layer's spec is made as vLLM's layer makes it (the class or file is named beside), from the configuration alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator, MambaStateShapeCalculator
from vllm.model_executor.models import ModelRegistry
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
)

BLOCK = 16
HEADS = {"num_kv_heads": 1}


def head_dim(text: dict[str, Any]) -> int:
    named: int | None = text.get("head_dim") or text.get("attention_head_dim")
    return named or text["hidden_size"] // text["num_attention_heads"]


class Engine(SimpleNamespace):
    """The parts of a VllmConfig that the specs ask for."""

    @classmethod
    def of(cls, case: dict[str, Any], text: dict[str, Any]) -> Engine:
        heads = max(1, (text.get("num_key_value_heads") or 1) // case["tp"])
        latent = bool(text.get("kv_lora_rank"))
        width = text["kv_lora_rank"] + text["qk_rope_head_dim"] if latent else head_dim(text)
        return cls(
            max_in_flight_tokens=case["step"],
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            scheduler_config=SimpleNamespace(max_num_encoder_input_tokens=case.get("encoder", 0)),
            cache_config=SimpleNamespace(
                mamba_cache_mode="align",
                cache_dtype="fp8" if case["fp8"] else "auto",
                block_size=BLOCK,
                mamba_page_size_padded=None,
                kv_cache_dtype_skip_layers=[],
            ),
            model_config=SimpleNamespace(
                max_model_len=case["context"],
                dtype=torch.bfloat16,
                use_mla=latent,
                architecture="",
                get_num_kv_heads=lambda _: 1 if latent else heads,
                get_head_size=lambda: width,
            ),
        )


def mamba_state(text: dict[str, Any], tp: int) -> tuple[Any, Any] | None:
    """Shapes and dtypes of one layer's state."""
    shapes, dtypes = MambaStateShapeCalculator, MambaStateDtypeCalculator
    if "linear_num_value_heads" in text:  # qwen3_next.py, Qwen3_5ForConditionalGenerationConfig
        keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
        widths = text["linear_key_head_dim"], text["linear_value_head_dim"]
        shape = shapes.gated_delta_net_state_shape(tp, keys, values, *widths, text["linear_conv_kernel_dim"])
        return shape, dtypes.gated_delta_net_state_dtype(torch.bfloat16, "auto", text.get("mamba_ssm_dtype", "auto"))
    if "mamba_num_heads" in text:  # nemotron_h.py, NemotronHForCausalLMConfig
        heads, width = text["mamba_num_heads"], text["mamba_head_dim"]
        shape = shapes.mamba2_state_shape(
            tp_world_size=tp,
            intermediate_size=heads * width,
            n_groups=text["n_groups"],
            num_heads=heads,
            head_dim=width,
            state_size=text["ssm_state_size"],
            conv_kernel=text["conv_kernel"],
        )
        kept = text.get("mamba_ssm_cache_dtype", "float32")
        return shape, dtypes.mamba2_state_dtype(torch.bfloat16, "auto", kept)
    if "linear_attn_config" in text:  # models/kimi_k3
        settings = text["linear_attn_config"]
        kernel = settings["short_conv_kernel_size"]
        shape = shapes.kda_state_shape(tp, settings["num_heads"], settings["head_dim"], conv_kernel_size=kernel)
        return shape, dtypes.kda_state_dtype(torch.bfloat16, "auto")
    return None


def align(engine: Engine, state: tuple[Any, Any]) -> None:
    """vLLM's own choice of the block size and padding of a hybrid."""
    model = SimpleNamespace(
        get_mamba_state_shape_from_config=lambda _: state[0], get_mamba_state_dtype_from_config=lambda _: state[1]
    )
    backend = SimpleNamespace(
        get_supported_kernel_block_sizes=lambda: [MultipleOf(BLOCK)], customize_spec=lambda spec: spec
    )
    with (
        mock.patch.object(type(ModelRegistry), "resolve_model_cls", return_value=(model, "")),
        mock.patch.object(Platform, "_find_non_ssm_backends", return_value=[]),
        mock.patch("vllm.config.vllm.set_current_vllm_config"),
    ):
        Platform._align_hybrid_block_size(engine, backend)


def kinds(text: dict[str, Any]) -> Iterator[str]:
    """What each layer is, as the family's vLLM class reads it."""
    layers = text.get("num_hidden_layers") or len(text.get("layers_block_type", ()))
    named = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    if text["model_type"] == "nemotron_h":
        blocks = text.get("layers_block_type") or [named[letter] for letter in text["hybrid_override_pattern"]]
        yield from ({"mamba": "state", "attention": "full"}.get(block, "") for block in blocks)
    elif settings := text.get("linear_attn_config"):
        yield from ("full" if layer + 1 in settings["full_attn_layers"] else "state" for layer in range(layers))
    elif "no_rope_layers" in text:
        yield from ("chunked" if rotary else "full" for rotary in text["no_rope_layers"])
    elif "hybrid_layer_pattern" in text:
        yield from ("sliding" if each else "full" for each in text["hybrid_layer_pattern"])
    elif "cross_attention_layers" in text:
        yield from ("cross" if layer in text["cross_attention_layers"] else "full" for layer in range(layers))
    elif any(kind != "deepseek_sparse_attention" for kind in text.get("layer_types", ())):
        shared = text.get("num_kv_shared_layers", 0)
        for kind in text["layer_types"][: layers - shared]:
            yield {"linear_attention": "state"}.get(kind, kind.removesuffix("_attention"))
    else:
        yield from ["full"] * layers


def heads_of(text: dict[str, Any], kind: str, layer: int) -> tuple[int, int, int]:
    """Key-value heads, dimension of a key, of a value."""
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    width = head_dim(text)
    if "swa_head_dim" in text:  # mimo_v2.py
        at = "swa_" if kind == "sliding" else ""
        return text[f"{at}num_key_value_heads"], text[f"{at}head_dim"], text[f"{at}v_head_dim"]
    if "global_head_dim" in text and kind == "full":  # gemma4.py
        own = text["num_global_key_value_heads"] if text["attention_k_eq_v"] else heads
        return own, text["global_head_dim"], text["global_head_dim"]
    if blocks := text.get("block_configs"):  # nemotron_nas.py
        group = blocks[layer]["attention"]["n_heads_in_group"]
        return (text["num_attention_heads"] // group if group else 0), width, width
    return heads, width, width


def specs(engine: Engine, text: dict[str, Any], tp: int, kept: torch.dtype) -> Iterator[KVCacheSpec]:
    block, state = engine.cache_config.block_size, mamba_state(text, tp)
    for layer, kind in enumerate(kinds(text)):
        if kind == "state" and state:  # layers/mamba/abstract.py
            yield MambaSpec(
                block_size=block,
                shapes=state[0],
                dtypes=state[1],
                page_size_padded=engine.cache_config.mamba_page_size_padded,
                num_prefill_checkpoint_blocks=1 if "linear_attn_config" in text else 0,
            )
        elif kind and text.get("kv_lora_rank"):  # layers/attention/mla_attention.py
            width = text["kv_lora_rank"] + text["qk_rope_head_dim"]
            yield MLAAttentionSpec(block_size=block, head_size=width, dtype=kept, **HEADS)
            yield from indexer(text, layer)
        elif kind:
            heads, key, value = heads_of(text, kind, layer)
            if not heads:
                continue
            yield attention(engine, text, kind, (max(1, heads // tp), key, value), kept)
            sparse = text.get("sparse_attention_config", {}).get("sparse_attention_freq")
            if sparse and sparse[layer]:  # models/minimax_m3/common/indexer.py
                index = text["sparse_attention_config"]["sparse_index_dim"]
                yield MLAAttentionSpec(block_size=BLOCK, head_size=index, dtype=torch.bfloat16, **HEADS)


def attention(
    engine: Engine, text: dict[str, Any], kind: str, dims: tuple[int, int, int], kept: torch.dtype
) -> KVCacheSpec:
    """layers/attention/attention.py, chunked_local_attention.py, cross_attention.py."""
    made: dict[str, Any] = {"num_kv_heads": dims[0], "head_size": dims[1], "head_size_v": dims[2], "dtype": kept}
    if kind == "sliding":
        return SlidingWindowSpec(block_size=BLOCK, sliding_window=text["sliding_window"], **made)
    if kind == "chunked":
        return ChunkedLocalAttentionSpec(block_size=BLOCK, attention_chunk_size=text["attention_chunk_size"], **made)
    if kind == "cross":
        return CrossAttentionSpec(block_size=BLOCK, **made)
    return FullAttentionSpec(block_size=engine.cache_config.block_size, **made)


def indexer(text: dict[str, Any], layer: int) -> Iterator[KVCacheSpec]:
    """models/deepseek_v32/attention.py."""
    if not text.get("index_topk"):
        return
    every, offset = text.get("index_topk_freq", 1), text.get("index_skip_topk_offset", 2)
    if max(layer - offset + 1, 0) % every == 0:
        width = text["index_head_dim"]
        yield MLAAttentionSpec(block_size=BLOCK, head_size=width + width // 128 * 4, dtype=torch.uint8, **HEADS)


def deepseek_v4(text: dict[str, Any]) -> Iterator[KVCacheSpec]:
    """models/deepseek_v4: attention.py, compressor.py, and the window of sparse_swa.py, in the fp8_ds_mla layout."""
    packed: dict[str, Any] = {"dtype": torch.uint8, "alignment": 576, "state_content_bytes": 584, **HEADS}
    for ratio in text["compress_ratios"][: text["num_hidden_layers"]]:
        window = {"sliding_window": text["sliding_window"], "model_version": "deepseek_v4"}
        yield SlidingWindowMLASpec(block_size=64, head_size=text["head_dim"], **window, **packed)
        if ratio <= 1:
            continue
        compressed = {"tokens_per_state": ratio, "model_version": "deepseek_v4"}
        yield MLAAttentionSpec(block_size=256, head_size=text["head_dim"], **compressed, **packed)
        yield compressor(ratio, text["head_dim"])
        if ratio == 4:
            width = text["index_head_dim"]
            index = {"tokens_per_state": ratio, "dtype": torch.uint8, "alignment": 576, **HEADS}
            yield MLAAttentionSpec(block_size=256, head_size=width + width // 128 * 4, **index)
            yield compressor(ratio, width)


def compressor(ratio: int, width: int) -> KVCacheSpec:
    overlap = 1 + (ratio == 4)
    return SlidingWindowMLASpec(
        block_size=4 if ratio == 4 else 8,
        head_size=2 * overlap * width,
        dtype=torch.float32,
        sliding_window=overlap * ratio,
        alignment=576,
        **HEADS,
    )


def held(case: dict[str, Any]) -> int:
    config = case["config"]
    text = {"model_type": config["model_type"], **config.get("text_config", config)}
    engine = Engine.of(case, text)
    if state := mamba_state(text, case["tp"]):
        align(engine, state)
    kept = torch.float8_e4m3fn if case["fp8"] else torch.bfloat16
    found = deepseek_v4(text) if "compress_ratios" in text else specs(engine, text, case["tp"], kept)
    return sum(spec.max_memory_usage_bytes(engine) for spec in found)


if __name__ == "__main__":
    json.dump([held(case) for case in json.load(sys.stdin)], sys.stdout)
