"""A Hugging Face directory as ModelFacts: config.json (nested text_config too), safetensors headers.

Where a published config.json leaves a field out, the default of that family's config class in
transformers applies; a family whose cache layout is not established here is known, not sized.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aim_profile.errors import ModelError

from .config_fields import (
    Config,
    attention_groups,
    experts,
    latent_attention,
    longest_context,
    quantization,
    rope_scaling,
)
from .facts import ModelFacts, Shape, what_is_impossible
from .parameters import (
    BYTES_PER_LINEAR_PARAMETER,
    SIXTEEN_BIT_BYTES,
    Parameters,
    count_parameters,
    linear_modules,
)
from .quantization import SERVED_AS, Quantization, by_precision
from .safetensors import Tensor, read_tensors

_MAX_CONFIG_BYTES = 16_000_000
_MOST_LAYERS = 2048  # each is looked at by name; no decoder has nearly so many
# Tensor name parts that quantisation leaves at 16 bits.
_KEPT = ("embed", "lm_head", "norm", "router", "gate.weight", "vision", "visual", "multi_modal", "wte", "wpe")
_SIXTEEN_BIT = {"BF16": "bf16", "F16": "fp16"}


def read_directory(directory: Path) -> ModelFacts:
    """Facts of the model in that directory; its id is the directory's path.

    Bytes are exact where safetensors files are present, computed from the dimensions otherwise.
    Raises ModelError naming the file and what is wrong with it.
    """
    file = directory / "config.json"
    config = Config.of(file, _read_json(file))
    tensors = read_tensors(directory)
    shape, missing = _shape(config)
    stated = _stated_quantization(config, directory)
    if not tensors and (config.has_vision or (shape is not None and not config.countable)):
        missing = (*missing, "the weights' size: no safetensors files beside config.json")
    return ModelFacts(
        id=str(directory),
        architecture=config.architecture,
        shape=shape,
        max_positions=(longest := longest_context(config)),
        max_positions_source=None if longest is None else str(file),
        rope_scaling=rope_scaling(config),
        source=str(file),
        confidence="documented",
        missing=missing,
        **_weights(config, shape, tensors, stated),
    )


def _stated_quantization(config: Config, directory: Path) -> Quantization | None:
    """From config.json, else from hf_quant_config.json beside it: the order in which vLLM looks."""
    stated = quantization(config)
    file = directory / "hf_quant_config.json"
    if stated is None and file.is_file():
        stated = _read_json(file)
        if not isinstance(stated, dict):
            raise ModelError(f"{file}: must be a JSON object", field=str(file))
    return Quantization.of(stated) if stated else None


def _weights(config: Config, shape: Shape | None, tensors: list[Tensor], stated: Quantization | None) -> dict[str, Any]:
    named = {"quantization": stated.method} if stated else {}
    return {**named, **(_measured(stated, tensors) if tensors else _computed(config, shape, stated))}


def _computed(config: Config, shape: Shape | None, stated: Quantization | None) -> dict[str, Any]:
    """Weights without their files: counted from the dimensions, each layer as the configuration says it is stored."""
    main = stated.main if stated else "bf16"
    if shape is None:
        return {"native_precision": SERVED_AS.get(main, main)}
    counted = count_parameters(config.architecture, shape)
    if stated is None:
        return {"native_precision": main, **_counts(counted)}
    if stated.strange or shape.layers > _MOST_LAYERS:
        note = f"not every layer its quantization names is understood: sized as if all linear layers were {main}"
        return {"native_precision": SERVED_AS.get(main, main), "notes": (note,), **_counts(counted)}
    held = by_precision(stated, linear_modules(shape))
    most = max(held, key=lambda precision: (precision != "bf16", held[precision], precision))
    facts: dict[str, Any] = {"native_precision": SERVED_AS.get(most, most), **_counts(counted)}
    if all(precision in BYTES_PER_LINEAR_PARAMETER for precision in held):
        linear = sum(count * BYTES_PER_LINEAR_PARAMETER[precision] for precision, count in held.items())
        facts["native_bytes"] = int(linear + counted.other * SIXTEEN_BIT_BYTES)
    return facts


def _measured(stated: Quantization | None, tensors: list[Tensor]) -> dict[str, Any]:
    """Weights by their files' own bytes."""
    quantized = SERVED_AS.get(stated.main, stated.main) if stated else None
    by_dtype = Counter[str]()
    for tensor in tensors:
        by_dtype[tensor.dtype] += tensor.size_bytes
    facts: dict[str, Any] = {"bytes_by_dtype": tuple(sorted(by_dtype.items())), "from_files": True}
    stored = max(by_dtype, key=lambda dtype: (by_dtype[dtype], dtype))
    if quantized is None and stored not in _SIXTEEN_BIT:
        quantized = _plain_precision(stored)
    if quantized == "fp32":
        facts["notes"] = ("the files are float32; engines load them as 16-bit",)
        return {**facts, "native_precision": "bf16", **_counts(_split(tensors))}
    facts["file_bytes"] = by_dtype.total()
    facts["native_precision"] = quantized or _SIXTEEN_BIT[stored]
    return {**facts, **_counts(None if quantized else _split(tensors))}


def _plain_precision(stored: str) -> str:
    if stored == "F32":
        return "fp32"
    return "fp8" if stored.startswith("F8") else stored.lower()


def _counts(parameters: Parameters | None) -> dict[str, int]:
    if parameters is None:
        return {}
    linear, other = parameters
    return {"linear_params": linear, "other_params": other, "total_params": parameters.total}


def _split(tensors: list[Tensor]) -> Parameters:
    linear = other = 0
    for tensor in tensors:
        count = 1
        for length in tensor.shape:
            count *= length
        if len(tensor.shape) < 2 or any(part in tensor.name for part in _KEPT):
            other += count
        else:
            linear += count
    return Parameters(linear, other)


def _shape(config: Config) -> tuple[Shape | None, tuple[str, ...]]:
    """The dimensions, or None and what is missing."""
    wanted = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "num_hidden_layers")
    if absent := [key for key in wanted if config.integer(key) is None]:
        return None, (f"config.json has no {', '.join(absent)}",)
    groups, why = attention_groups(config)
    if why:
        return None, (why,)
    hidden, heads = config.required("hidden_size"), config.required("num_attention_heads")
    try:
        return Shape(
            hidden=hidden,
            heads=heads,
            kv_heads=config.integer("num_key_value_heads") or heads,
            head_dim=config.integer("head_dim") or hidden // heads,
            ffn=config.integer("intermediate_size_mlp") or config.required("intermediate_size"),
            vocab=config.required("vocab_size"),
            tied=config.tied,
            attention=groups,
            experts=experts(config),
            mla=latent_attention(config),
        ), ()
    except (ValidationError, ZeroDivisionError) as problem:
        raise ModelError(
            f"{config.file}: impossible dimensions: {what_is_impossible(problem)}", field=str(config.file)
        ) from problem


def _read_json(file: Path) -> Any:
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelError(f"{file}: larger than any config.json", field=str(file))
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise ModelError(
            f"{file}: no such file", field=str(file), remedy="name a directory that holds a config.json"
        ) from problem
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{file}: not JSON: {problem}", field=str(file)) from problem
