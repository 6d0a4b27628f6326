"""Layer by layer: what attends how, and which layers have experts, as the families' configurations say it.

Sources: the families' classes in huggingface/transformers, and for what is cached vllm-project/vllm
(vllm/model_executor/models, vllm/models).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from aim_profile.errors import ModelError

from .config_fields import Config, attention_groups
from .facts import Attention, State

# Layers are looked at one by one; no decoder has nearly so many.
MOST_LAYERS = 2048
# DeepSeek's indexer keeps fp8 values and a 4-byte scale for 128 of them.
_INDEX_BLOCK, _INDEX_SCALE_BYTES = 128, 4
_NEMOTRON = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


def listed(config: Config, key: str, length: int) -> list[Any] | None:
    """That field as a list of one entry a layer, None where it is not there. Raises ModelError for another length."""
    found = config.text.get(key)
    if found is None:
        return None
    if not isinstance(found, list) or len(found) < length:
        held = len(found) if isinstance(found, list) else repr(found)
        raise ModelError(f"{config.file}: {key} names {held} layers of {length}", field=key)
    return found[:length]


def layer_count(config: Config) -> int:
    """Decoder layers: stated, or as many as a hybrid's list names. Raises ModelError for more than MOST_LAYERS."""
    blocks = config.text.get("layers_block_type")
    if config.integer("num_hidden_layers") is None and isinstance(blocks, list):
        count = len(blocks)
    else:
        count = config.required("num_hidden_layers")
    if not 0 < count <= MOST_LAYERS:
        raise ModelError(f"{config.file}: {count} layers", field="num_hidden_layers", value=count)
    return count


def nemotron_blocks(config: Config) -> list[str]:
    """`mamba`, `attention`, `moe` or `mlp` for each block of a Nemotron-H."""
    count = layer_count(config)
    if (blocks := listed(config, "layers_block_type", count)) is None:
        pattern = config.text.get("hybrid_override_pattern")
        if not isinstance(pattern, str) or len(pattern) != count:
            raise ModelError(
                f"{config.file}: hybrid_override_pattern is {pattern!r:.80}", field="hybrid_override_pattern"
            )
        blocks = [_NEMOTRON.get(letter, letter) for letter in pattern]
    if strange := sorted({str(block) for block in blocks} - set(_NEMOTRON.values())):
        raise ModelError(f"{config.file}: unknown blocks {', '.join(strange)[:80]}", field="layers_block_type")
    return [str(block) for block in blocks]


def nemotron_prediction(config: Config) -> list[str]:
    """The blocks of one of Nemotron's layers that predict a further token; none: not stated."""
    pattern = config.text.get("mtp_hybrid_override_pattern")
    stated = config.text.get("mtp_layers_block_type") or (list(pattern) if isinstance(pattern, str) else [])
    blocks = [_NEMOTRON.get(str(each), str(each)) for each in stated] if isinstance(stated, list) else []
    return blocks if set(blocks) <= set(_NEMOTRON.values()) else []


def sparse_layers(config: Config) -> list[bool]:
    """Which layers have experts, under any of the names the families use."""
    count = layer_count(config)
    if (kinds := listed(config, "mlp_layer_types", count)) is not None:
        return [kind == "sparse" for kind in kinds]
    if isinstance(config.text.get("moe_layer_freq"), list):
        return [bool(each) for each in listed(config, "moe_layer_freq", count) or ()]
    dense = config.integer("first_k_dense_replace") or config.integer("moe_layer_start_index") or 0
    without = _numbers(config.text.get("mlp_only_layers"))
    return [layer >= dense and layer not in without for layer in range(count)]


def _numbers(found: object) -> frozenset[int]:
    return frozenset(each for each in found if isinstance(each, int)) if isinstance(found, list) else frozenset()


def kinds(config: Config) -> list[str]:
    """`full`, `sliding`, `linear`, … for each layer."""
    count = layer_count(config)
    if (pattern := listed(config, "hybrid_layer_pattern", count)) is not None:
        return ["sliding" if each else "full" for each in pattern]
    if isinstance(linear := config.text.get("linear_attn_config"), dict):
        full = _numbers(linear.get("full_attn_layers"))
        return ["full" if layer + 1 in full else "linear" for layer in range(count)]
    if (types := listed(config, "layer_types", count)) is None:
        every = config.integer("full_attention_interval") or 1
        return ["linear" if (layer + 1) % every else "full" for layer in range(count)]
    known = {"full_attention": "full", "sliding_attention": "sliding", "linear_attention": "linear"}
    known["deepseek_sparse_attention"] = "full"
    if strange := sorted({str(each) for each in types} - set(known)):
        raise ModelError(f"{config.file}: layer_types has {', '.join(strange)[:80]}", field="layer_types")
    return [known[each] for each in types]


def indexed_layers(config: Config) -> list[bool]:
    """Which layers of DeepSeek's sparse attention have an indexer of their own; the others take an earlier one's
    choice (vllm/models/deepseek_v32/attention.py).
    """
    count = layer_count(config)
    if not config.integer("index_topk"):
        return [False] * count
    pattern, every = config.text.get("index_topk_pattern"), config.integer("index_topk_freq") or 1
    if isinstance(pattern, str | list):
        return [layer >= len(pattern) or pattern[layer] != "S" for layer in range(count)]
    offset = config.integer("index_skip_topk_offset")
    return [max(layer - (2 if offset is None else offset) + 1, 0) % every == 0 for layer in range(count)]


def as_listed(config: Config) -> tuple[Attention, ...]:
    """Families told apart by config_fields: alike, or sliding by a pattern or a switch."""
    groups, why = attention_groups(config)
    if why:
        raise ModelError(f"{config.file}: {why}", field="layer_types")
    return groups


def full_or_window(config: Config) -> tuple[Attention, ...]:
    """Full and sliding layers of the same heads."""
    return _counted(kinds(config), lambda kind: Attention(kind=kind, layers=1, window=_window(config, kind)))


def indexed_latent(config: Config) -> tuple[Attention, ...]:
    """Latent attention, with an indexer's keys where a layer has one: DeepSeek-V3.2, GLM-5."""
    width = config.integer("index_head_dim") or 0
    key = width + width // _INDEX_BLOCK * _INDEX_SCALE_BYTES
    owners = indexed_layers(config)
    return _counted(owners, lambda own: Attention(kind="full", layers=1, index_bytes=key if own else 0))


def gemma4(config: Config) -> tuple[Attention, ...]:
    """Full layers have their own heads; the last layers read an earlier layer's cache."""
    own, shared = kinds(config), shared_layers(config)
    own = [*own[: len(own) - shared], *["shared"] * shared]

    def one(kind: Any) -> Attention:
        if kind != "full":
            return Attention(kind=kind, layers=1, window=_window(config, kind))
        heads, width = gemma4_full_heads(config)
        return Attention(kind="full", layers=1, kv_heads=heads, key_dim=width, value_dim=width)

    return _counted(own, one)


def shared_layers(config: Config) -> int:
    """How many of the last layers read an earlier layer's cache. Raises ModelError for more than there are."""
    shared, count = config.integer("num_kv_shared_layers") or 0, layer_count(config)
    if shared >= count:
        raise ModelError(f"{config.file}: num_kv_shared_layers is {shared} of {count}", field="num_kv_shared_layers")
    return shared


def gemma4_full_heads(config: Config) -> tuple[int, int]:
    """Key-value heads and head dimension of Gemma 4's full layers."""
    heads = config.integer("num_global_key_value_heads") if config.text.get("attention_k_eq_v") else None
    return (
        heads or config.required("num_key_value_heads"),
        config.integer("global_head_dim") or config.required("head_dim"),
    )


def mimo_v2(config: Config) -> tuple[Attention, ...]:
    """Full and sliding layers, each of their own heads, values narrower than keys."""

    def one(kind: Any) -> Attention:
        at = "swa_" if kind == "sliding" else ""
        return Attention(
            kind=kind,
            layers=1,
            window=_window(config, kind),
            kv_heads=config.required(f"{at}num_key_value_heads"),
            key_dim=config.required(f"{at}head_dim"),
            value_dim=config.required(f"{at}v_head_dim"),
        )

    return _counted(kinds(config), one)


def minimax_m3(config: Config) -> tuple[Attention, ...]:
    """Full attention; sparse layers keep one index key of a token beside, at 16 bits."""
    width = sparse_setting(config, "sparse_index_dim")
    sparse = minimax_sparse(config)
    return _counted(sparse, lambda own: Attention(kind="full", layers=1, index_bytes=2 * width if own else 0))


def minimax_sparse(config: Config) -> list[bool]:
    """Which layers of a MiniMax-M3 attend sparsely."""
    count = layer_count(config)
    settings = config.text.get("sparse_attention_config")
    found = settings.get("sparse_attention_freq") if isinstance(settings, dict) else None
    if not isinstance(found, list) or len(found) != count:
        raise ModelError(f"{config.file}: sparse_attention_freq is no list of {count}", field="sparse_attention_config")
    return [bool(each) for each in found]


def sparse_setting(config: Config, key: str) -> int:
    """A number of MiniMax-M3's sparse_attention_config."""
    return config.whole_number(config.text.get("sparse_attention_config"), key)


def gated_delta(config: Config) -> tuple[Attention, ...]:
    """Full attention and gated delta nets: Qwen3-Next, Qwen3.5."""
    keys, values = config.required("linear_num_key_heads"), config.required("linear_num_value_heads")
    key_dim, value_dim = config.required("linear_key_head_dim"), config.required("linear_value_head_dim")
    state = State(
        conv_rows=config.required("linear_conv_kernel_dim") - 1,
        conv_channels=2 * keys * key_dim + values * value_dim,
        recurrent=values * key_dim * value_dim,
        # vLLM takes mamba_ssm_dtype where a configuration has it, else the weights' (MambaStateDtypeCalculator).
        recurrent_bytes=4 if config.text.get("mamba_ssm_dtype") == "float32" else 2,
        heads=keys,
    )
    return _with_state(kinds(config), state)


def kimi_delta(config: Config) -> tuple[Attention, ...]:
    """Latent attention and Kimi's delta attention, whose recurrent state is float32."""
    settings = config.text.get("linear_attn_config")
    heads, width = config.whole_number(settings, "num_heads"), config.whole_number(settings, "head_dim")
    state = State(
        conv_rows=config.whole_number(settings, "short_conv_kernel_size") - 1,
        conv_channels=3 * heads * width,
        recurrent=heads * width * width,
        heads=heads,
        checkpoints=1,
    )
    return _with_state(kinds(config), state)


def mamba2(config: Config) -> tuple[Attention, ...]:
    """Nemotron-H's attention and Mamba-2 blocks; its feed-forward blocks keep nothing."""
    heads, width = config.required("mamba_num_heads"), config.required("mamba_head_dim")
    size = config.required("ssm_state_size")
    state = State(
        conv_rows=config.required("conv_kernel") - 1,
        conv_channels=heads * width,
        groups=config.required("n_groups"),
        group_channels=2 * size,
        recurrent=heads * width * size,
        # float32 unless the configuration says otherwise (vLLM's NemotronHForCausalLMConfig).
        recurrent_bytes=2 if config.text.get("mamba_ssm_cache_dtype") in ("bfloat16", "float16") else 4,
        heads=heads,
    )
    blocks = [{"mamba": "linear", "attention": "full"}.get(block) for block in nemotron_blocks(config)]
    return _with_state([block for block in blocks if block is not None], state)


def searched(config: Config) -> tuple[Attention, ...]:
    """Nemotron's searched layers, each with its own key-value heads or without attention."""
    heads = [keys for keys, _ in searched_blocks(config) if keys]
    return _counted(heads, lambda keys: Attention(kind="full", layers=1, kv_heads=keys))


def searched_blocks(config: Config) -> list[tuple[int, int]]:
    """Key-value heads and inner width of each layer of a Nemotron that a search has pruned, 0 where it has none."""
    heads, hidden = config.required("num_attention_heads"), config.required("hidden_size")
    if (blocks := listed(config, "block_configs", layer_count(config))) is None:
        raise ModelError(f"{config.file}: block_configs is missing", field="block_configs")
    return [(_searched_heads(config, heads, block), _searched_width(config, hidden, block)) for block in blocks]


def _searched_part(config: Config, block: object, name: str) -> dict[str, Any] | None:
    """None where the layer has no such part. Raises ModelError for one that is not understood."""
    part = block.get(name) if isinstance(block, dict) else None
    odd = ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens")
    if not isinstance(part, dict) or any(part.get(key) for key in odd):
        raise ModelError(f"{config.file}: block_configs: {name} is {part!r:.80}", field="block_configs")
    return None if part.get("no_op") is True else part


def _searched_heads(config: Config, heads: int, block: object) -> int:
    part = _searched_part(config, block, "attention")
    return max(1, heads // config.whole_number(part, "n_heads_in_group")) if part is not None else 0


def _searched_width(config: Config, hidden: int, block: object) -> int:
    """2/3 of the multiple of the hidden width, up to a multiple of 256."""
    part = _searched_part(config, block, "ffn")
    if part is None:
        return 0
    times = part.get("ffn_mult")
    if isinstance(times, bool) or not isinstance(times, int | float) or not 0 < times < 1024:
        raise ModelError(f"{config.file}: block_configs: ffn_mult is {times!r:.80}", field="ffn_mult")
    return -(-int(2 * times * hidden / 3) // 256) * 256


def feed_width(config: Config) -> int:
    """Inner values of the widest dense feed-forward part, of an expert where there is no other; 0: not stated."""
    if config.architecture == "nemotron-nas":
        return max(width for _, width in searched_blocks(config))
    named = (config.integer(key) for key in ("intermediate_size_mlp", "intermediate_size", "moe_intermediate_size"))
    return next((width for width in named if width), 0)


def compressed(config: Config) -> tuple[Attention, ...]:
    """DeepSeek-V4: a window in every layer, and behind it nothing, every 4 or every 128 tokens as one."""
    index = config.required("index_head_dim")
    key = index + index // _INDEX_BLOCK * _INDEX_SCALE_BYTES

    def one(ratio: Any) -> Attention:
        return Attention(
            kind="compressed",
            layers=1,
            window=config.required("sliding_window"),
            ratio=ratio,
            key_dim=config.required("head_dim"),
            kv_heads=1,
            index_bytes=key if ratio == 4 else 0,
        )

    return _counted(ratios(config), one)


def ratios(config: Config) -> list[int]:
    """How many tokens each layer of a DeepSeek-V4 keeps as one: 1, 4 or 128."""
    found = listed(config, "compress_ratios", layer_count(config)) or []
    each = [max(1, ratio) if isinstance(ratio, int) else ratio for ratio in found]
    if not each or any(ratio not in (1, 4, 128) for ratio in each):
        raise ModelError(f"{config.file}: compress_ratios is {found[:4]!r:.80}", field="compress_ratios")
    return each


def _window(config: Config, kind: str) -> int | None:
    return config.required("sliding_window") if kind == "sliding" else None


def _with_state(found: list[str], state: State) -> tuple[Attention, ...]:
    return _counted(
        found,
        lambda kind: (
            Attention(kind="linear", layers=1, state=state) if kind == "linear" else Attention(kind=kind, layers=1)
        ),
    )


def _counted(layers: list[Any], one: Callable[[Any], Attention]) -> tuple[Attention, ...]:
    """Equal layers as groups, in the order in which the first of each comes."""
    return tuple(one(kind).model_copy(update={"layers": count}) for kind, count in Counter(layers).items())
