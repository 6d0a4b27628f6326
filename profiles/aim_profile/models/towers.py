"""Image towers counted from vision_config: patches, blocks, and the projection into the decoder.

Layouts are those of the families' classes in huggingface/transformers; of Kimi's vllm-project/vllm's kimi_k25_vit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .config_fields import Config


class _Tower(NamedTuple):
    """vision_config, and where it stands."""

    config: Config
    fields: dict[str, Any]

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1, or the family's default where it is left out. Raises ModelError."""
        if key not in self.fields and default is not None:
            return default
        return self.config.whole_number(self.fields, key)


def tower_parameters(config: Config) -> int | None:
    """Parameters of the image tower and its projection, 0 without one, None where its layout is not established.

    Raises ModelError where vision_config leaves out what its family needs.
    """
    if config.whole.get("audio_config") is not None:
        return None
    fields = config.whole.get("vision_config")
    if fields is None:
        return 0
    count = _TOWERS.get(config.architecture)
    if count is None or not isinstance(fields, dict):
        return None
    return count(_Tower(config, fields))


def _block(width: int, inner: int, ffn: int, *, bias: int = 1, norm: int = 2) -> int:
    """Attention of `inner` values, a feed-forward part of two matrices, two norms of `norm` vectors each."""
    attention = 4 * width * inner + bias * (3 * inner + width)
    return attention + 2 * width * ffn + bias * (ffn + width) + 2 * norm * width


def _qwen3(tower: _Tower) -> int:
    """Qwen3-VL and Qwen3.5: a merger at the end, and one for each layer whose features go deep into the decoder."""
    width, out = tower.number("hidden_size"), tower.number("out_hidden_size")
    merged = width * tower.number("spatial_merge_size") ** 2
    patch = tower.number("in_channels", 3) * tower.number("temporal_patch_size") * tower.number("patch_size") ** 2
    merger = merged**2 + merged + merged * out + out
    deep = tower.fields.get("deepstack_visual_indexes")
    mergers = merger + 2 * width + (len(deep) if isinstance(deep, list) else 0) * (merger + 2 * merged)
    blocks = tower.number("depth") * _block(width, width, tower.number("intermediate_size"))
    return patch * width + width + tower.number("num_position_embeddings") * width + blocks + mergers


def _siglip(tower: _Tower) -> int:
    """Gemma 3: SigLIP, a norm and a projection."""
    width, patch = tower.number("hidden_size"), tower.number("patch_size")
    places = (tower.number("image_size") // patch) ** 2
    blocks = tower.number("num_hidden_layers") * _block(width, width, tower.number("intermediate_size"))
    embedded = 3 * patch**2 * width + width + places * width
    return embedded + blocks + 2 * width + width + width * tower.config.required("hidden_size")


def _gemma4(tower: _Tower) -> int:
    width, heads = tower.number("hidden_size"), tower.number("num_attention_heads")
    keys, head_dim = tower.number("num_key_value_heads"), tower.number("head_dim")
    attention = 2 * width * (heads + keys) * head_dim + 2 * head_dim
    block = attention + 3 * width * tower.number("intermediate_size") + 4 * width
    embedded = 3 * tower.number("patch_size") ** 2 * width + 2 * tower.number("position_embedding_size") * width
    scaled = 2 * width if tower.fields.get("standardize") is True else 0
    out = width * tower.config.required("hidden_size")
    return embedded + tower.number("num_hidden_layers") * block + scaled + out


def _kimi(tower: _Tower) -> int:
    """MoonViT: K2.5's with biases and LayerNorm, K3's with neither."""
    width, ffn = tower.number("vt_hidden_size"), tower.number("vt_intermediate_size")
    inner = tower.number("qkv_hidden_size", width)
    plain = tower.fields.get("norm_type") == "rmsnorm"
    bias, norm = (0, 1) if plain else (1, 2)
    blocks = tower.number("vt_num_hidden_layers") * _block(width, inner, ffn, bias=bias, norm=norm)
    places = tower.number("init_pos_emb_height") * tower.number("init_pos_emb_width")
    embedded = 3 * tower.number("patch_size") ** 2 * width + bias * width + places * width
    merged, out = 4 * width, tower.config.required("hidden_size")
    projection = merged**2 + merged * out + (out if plain else merged + out + 2 * width)
    return embedded + blocks + norm * width + projection


def _minimax(tower: _Tower) -> int:
    """MiniMax-M3: a CLIP tower over pairs of frames, two projections before and after patches are merged."""
    width, ffn = tower.number("hidden_size"), tower.number("intermediate_size")
    settings = tower.fields.get("img_token_compression_config")
    nested = _Tower(tower.config, settings if isinstance(settings, dict) else {})
    merge, frames = nested.number("spatial_merge_size", 2), nested.number("temporal_patch_size", 2)
    embedded = 3 * frames * tower.number("patch_size") ** 2 * width + 2 * width
    out = tower.config.required("hidden_size")
    through = tower.config.whole_number(tower.config.whole, "projector_hidden_size")
    projections = (width + out * merge**2) * through + 2 * through * out + 2 * through + 2 * out
    return embedded + tower.number("num_hidden_layers") * _block(width, width, ffn) + projections


_TOWERS: dict[str, Callable[[_Tower], int]] = {
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _qwen3),
    **dict.fromkeys(("kimi_k25", "kimi_k3"), _kimi),
    "gemma3": _siglip,
    "gemma4": _gemma4,
    "minimax_m3_vl": _minimax,
}
