"""The fields of config.json that decide memory, family by family.

Layouts and defaults are those of the families' classes in huggingface/transformers
(`models/<family>/configuration_<family>.py` and `modeling_<family>.py`).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, Self

from aim_profile.errors import ModelError

from .facts import Attention, AttentionKind, Experts, Mla

# Published gemma-3 configs leave these out; Gemma3TextConfig fills them in.
_GEMMA3 = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 131072,
}
_DEFAULTS: dict[str, dict[str, int]] = {"gemma3": _GEMMA3, "gemma3_text": _GEMMA3}
_TIED_BY_DEFAULT = {
    *("gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "cohere", "cohere2"),
    *("starcoder2", "ernie4_5", "ernie4_5_moe"),
}
# Families whose layers are all alike unless the config says otherwise.
_UNIFORM = {
    *("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "cohere", "granite", "olmo2", "smollm3"),
    *("deepseek_v2", "deepseek_v3", "phi", "stablelm", "starcoder2", "glm", "glm4", "olmoe", "granitemoe"),
}
# Families in which a sliding_window applies to every layer.
_ALL_SLIDING = {"mistral", "mistral3", "mixtral", "phi3", "starcoder2"}
# Every n-th layer is full, the others slide: n by default.
_PATTERN = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
_COUNTABLE = {
    *("llama", "mistral", "mistral3", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text"),
    *("gemma3", "cohere", "deepseek_v3", "llama4", "smollm3"),
}
_LAYER_TYPES: dict[str, AttentionKind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}


class Config(NamedTuple):
    """config.json with its text part found: `text` is text_config where there is one."""

    file: Path
    whole: dict[str, Any]
    text: dict[str, Any]
    architecture: str

    @classmethod
    def of(cls, file: Path, raw: object) -> Self:
        """Checks the outer form. Raises ModelError."""
        if not isinstance(raw, dict):
            raise ModelError(f"{file}: must be a JSON object", field=str(file))
        text = raw.get("text_config", raw)
        model_type = raw.get("model_type")
        if not isinstance(text, dict) or not isinstance(model_type, str):
            raise ModelError(f"{file}: model_type must be a string, text_config an object", field=str(file))
        return cls(file, raw, text, model_type)

    def integer(self, key: str) -> int | None:
        """That field of the text part, else the family's default. Raises ModelError if not an integer."""
        value = self.text.get(key)
        if value is None:
            return _DEFAULTS.get(self.architecture, {}).get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**48:
            raise ModelError(f"{self.file}: {key} is {value!r}, not a whole number", field=key, value=value)
        return value

    def required(self, key: str) -> int:
        """That field, which must be there and at least 1."""
        value = self.integer(key)
        if not value:
            raise ModelError(f"{self.file}: {key} is missing or 0", field=key, value=value)
        return value

    def whole_number(self, settings: object, key: str) -> int:
        """That field of an object inside the configuration, which must be there and at least 1."""
        found = settings.get(key) if isinstance(settings, dict) else None
        if isinstance(found, bool) or not isinstance(found, int) or not 0 < found < 2**48:
            raise ModelError(f"{self.file}: {key} is {found!r:.80}, not a whole number", field=key, value=found)
        return found

    @property
    def tied(self) -> bool:
        """Whether lm_head is the embedding matrix."""
        for part in (self.text, self.whole):
            if isinstance(part.get("tie_word_embeddings"), bool):
                return bool(part["tie_word_embeddings"])
        return self.architecture in _TIED_BY_DEFAULT

    @property
    def countable(self) -> bool:
        """Whether parameters.py counts this family from its dimensions."""
        return self.architecture in _COUNTABLE


def attention_groups(config: Config) -> tuple[tuple[Attention, ...], str]:
    """Groups of equal layers, or () and why the cache layout is not established."""
    layers = config.required("num_hidden_layers")
    if isinstance(config.text.get("num_key_value_heads"), list):
        return (), "key-value heads differ by layer"
    if config.architecture == "mllama":
        return _cross(config, layers), ""
    if isinstance(kinds := config.text.get("layer_types"), list):
        return _listed(config, kinds, layers)
    if config.architecture == "llama4":
        return _chunked(config, layers), ""
    if config.architecture in _PATTERN:
        every = config.integer("sliding_window_pattern") or _PATTERN[config.architecture]
        return _mixed(config, layers, layers // every), ""
    if config.architecture in _ALL_SLIDING:
        return _mixed(config, layers, layers if not config.integer("sliding_window") else 0), ""
    if config.architecture in _UNIFORM:
        return _mixed(config, layers, _full_before_window(config, layers)), ""
    return (), f"the cache layout of architecture {config.architecture!r} is not established"


def _full_before_window(config: Config, layers: int) -> int:
    """Qwen slides from max_window_layers on, and only where use_sliding_window says so."""
    if not config.text.get("use_sliding_window"):
        return layers
    return min(layers, config.integer("max_window_layers") or layers)


def _mixed(config: Config, layers: int, full: int) -> tuple[Attention, ...]:
    groups = [Attention(kind="full", layers=full)] if full else []
    if layers > full:
        window = config.required("sliding_window")
        groups.append(Attention(kind="sliding", layers=layers - full, window=window))
    return tuple(groups)


def _listed(config: Config, kinds: list[Any], layers: int) -> tuple[tuple[Attention, ...], str]:
    strange = [kind for kind in kinds if not isinstance(kind, str) or kind not in _LAYER_TYPES]
    if strange or len(kinds) != layers:
        return (), f"layer_types names {len(kinds)} layers of {layers}, unknown kinds: {strange[:2]}"
    counts = Counter(_LAYER_TYPES[kind] for kind in kinds)
    windows = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
    return tuple(
        Attention(kind=kind, layers=count, window=config.required(windows[kind]) if kind in windows else None)
        for kind, count in sorted(counts.items())
    ), ""


def _cross(config: Config, layers: int) -> tuple[Attention, ...]:
    listed = config.text.get("cross_attention_layers")
    crossing = len(listed) if isinstance(listed, list) else 0
    if not 0 < crossing < layers:
        raise ModelError(f"{config.file}: cross_attention_layers is {listed!r}", field="cross_attention_layers")
    return Attention(kind="full", layers=layers - crossing), Attention(kind="cross", layers=crossing)


def _chunked(config: Config, layers: int) -> tuple[Attention, ...]:
    """Llama 4: layers with rotary positions are chunked, every fourth has none and is full."""
    rotary = config.text.get("no_rope_layers")
    full = rotary.count(0) if isinstance(rotary, list) and rotary else layers // 4
    window = config.required("attention_chunk_size")
    groups = [Attention(kind="full", layers=full)] if full else []
    if layers > full:
        groups.append(Attention(kind="chunked", layers=layers - full, window=window))
    return tuple(groups)


def experts(config: Config) -> Experts | None:
    """The mixture of experts, under any of the names the families use; None for a dense model."""
    counts = (config.integer(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    count = next((found for found in counts if found), None)
    if count is None:
        return None
    shared = config.integer("n_shared_experts") or 0
    dense = config.integer("first_k_dense_replace") or 0
    if config.architecture == "llama4":
        shared, step = 1, config.integer("interleave_moe_layer_step") or 1
        dense = config.required("num_hidden_layers") * (step - 1) // step
    return Experts(
        count=count,
        per_token=config.integer("num_experts_per_tok") or 1,
        shared=shared,
        ffn=config.integer("moe_intermediate_size") or config.required("intermediate_size"),
        dense_layers=dense,
    )


def latent_attention(config: Config) -> Mla | None:
    """DeepSeek's ranks, None for other families."""
    rank = config.integer("kv_lora_rank")
    if not rank:
        return None
    return Mla(
        kv_rank=rank,
        rope_dim=config.required("qk_rope_head_dim"),
        nope_dim=config.required("qk_nope_head_dim"),
        value_dim=config.required("v_head_dim"),
        query_rank=config.integer("q_lora_rank") or None,
    )


def longest_context(config: Config) -> int | None:
    """The longest context the model was made for, as vLLM reads it; None where the configuration does not say.

    model_max_length goes first (Command R states its length there and a shorter max_position_embeddings). Rope
    scaling is stated by `rope_scaling`, never multiplied in: published lengths already count it.
    """
    return config.integer("model_max_length") or config.integer("max_position_embeddings")


def rope_scaling(config: Config) -> str | None:
    """The scaling of rotary positions that the configuration states, in words; None where it states none."""
    stated = config.text.get("rope_scaling") or config.text.get("rope_parameters")
    if not isinstance(stated, dict):
        return None
    kind = stated.get("rope_type", stated.get("type"))
    factor, original = stated.get("factor"), stated.get("original_max_position_embeddings")
    if not isinstance(kind, str) or kind == "default" or (factor is None and original is None):
        return None
    by = f", factor {factor:g}" if isinstance(factor, int | float) else ""
    of = f" of {original}" if isinstance(original, int) else ""
    return f"rope scaling {kind}{by}{of}"


def quantization(config: Config) -> dict[str, Any] | None:
    """quantization_config as it stands (multimodal models may keep it in text_config), None without one."""
    found = config.whole.get("quantization_config") or config.text.get("quantization_config")
    if not isinstance(found, dict):
        return None
    return {**found, "expert_dtype": config.text["expert_dtype"]} if "expert_dtype" in config.text else found
