"""A Hugging Face directory as ModelFacts: config.json (nested text_config too), safetensors headers.

Where a published config.json leaves a field out, the default of that family's config class in
transformers applies; a family whose cache layout is not established here is known, not sized.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from .decoders import experts_of, read_decoder
from .facts import Attention, Experts, ModelFacts, Shape, what_is_impossible
from .layouts import MOST_LAYERS, feed_width
from .modules import Module, total
from .parameters import (
    BYTES_PER_LINEAR_PARAMETER,
    SIXTEEN_BIT_BYTES,
    Parameters,
    active_parameters,
    count_parameters,
    linear_modules,
)
from .quantization import SERVED_AS, Quantization, by_precision
from .safetensors import Tensor, read_tensors
from .towers import tower_parameters

_MAX_CONFIG_BYTES = 16_000_000
_HEAD = "lm_head"
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
    return ModelFacts(
        id=str(directory),
        source=str(file),
        confidence="documented",
        **_facts(config, _stated_quantization(config, directory), tensors),
    )


def config_facts(config: Config) -> dict[str, Any]:
    """Fields of ModelFacts that a configuration alone decides. Raises ModelError."""
    stated = quantization(config)
    return _facts(config, Quantization.of(stated) if stated else None, [])


def _facts(config: Config, stated: Quantization | None, tensors: list[Tensor]) -> dict[str, Any]:
    # Files say themselves what an image tower weighs.
    shape, counted, missing = _described(config, 0 if tensors else tower_parameters(config))
    if not tensors and shape is not None and counted is None:
        missing = (*missing, "the weights' size: no safetensors files beside config.json")
    weights = _measured(stated, tensors) if tensors else _computed(config, counted, stated)
    notes = (*weights.pop("notes", ()), *(() if tensors else _not_counted(config, counted)))
    longest = longest_context(config)
    return {
        "architecture": config.architecture,
        "shape": shape,
        "max_positions": longest,
        "max_positions_source": None if longest is None else str(config.file),
        "rope_scaling": rope_scaling(config),
        "missing": missing,
        "quantization": stated.method if stated else None,
        "expert_params": sum(m.parameters for m in counted.modules if ".experts." in m.name) if counted else None,
        "active_params": counted.active if counted else None,
        "prediction_params": counted.prediction if counted else 0,
        "notes": notes,
        **weights,
    }


def _not_counted(config: Config, counted: _Counted | None) -> Iterator[str]:
    """What published files hold beside what is counted."""
    if counted is not None and counted.prediction != 0:
        much = f" ({counted.prediction / 1e9:.2f} B parameters)" if counted.prediction else ""
        yield f"layers that predict further tokens are not counted{much}: loaded for speculative decoding only"
    named = config.whole.get("architectures")
    multimodal = isinstance(named, list) and any("ForConditionalGeneration" in str(name) for name in named)
    if counted is not None and multimodal and config.whole.get("vision_config") is None:
        yield "config.json describes no image tower, though its class has one: the decoder alone is counted"


def _stated_quantization(config: Config, directory: Path) -> Quantization | None:
    """From config.json, else from hf_quant_config.json beside it: the order in which vLLM looks."""
    stated = quantization(config)
    file = directory / "hf_quant_config.json"
    if stated is None and file.is_file():
        stated = _read_json(file)
        if not isinstance(stated, dict):
            raise ModelError(f"{file}: must be a JSON object", field=str(file))
    return Quantization.of(stated) if stated else None


class _Counted(NamedTuple):
    """Parameters of a whole model, and its modules where their names are known."""

    parameters: Parameters
    active: int
    modules: tuple[Module, ...] = ()
    prediction: int | None = 0


def _described(config: Config, tower: int | None) -> tuple[Shape | None, _Counted | None, tuple[str, ...]]:
    """The dimensions and the parameters, each None where it is not established, and what is missing."""
    try:
        decoder = read_decoder(config)
    except ValidationError as problem:
        raise _impossible(config, problem) from problem
    if decoder is None:
        shape, missing = _shape(config, vision_params=tower or 0)
        countable = shape is not None and config.countable and tower is not None
        return shape, _of_shape(config, shape) if shape and countable else None, missing
    shape = _checked_shape(
        config,
        decoder.attention,
        experts_of(config, decoder.attention),
        vision_params=tower or 0,
    )
    if tower is None:
        return shape, None, ()
    linear = total(module for module in decoder.modules if module.linear)
    other = total(module for module in decoder.modules if not module.linear) + tower
    active = sum(module.active for module in decoder.modules)
    return shape, _Counted(Parameters(linear, other), active, decoder.modules, decoder.prediction), ()


def _of_shape(config: Config, shape: Shape) -> _Counted:
    counted = count_parameters(config.architecture, shape)
    modules = tuple(Module(*named) for named in linear_modules(shape)) if shape.layers <= MOST_LAYERS else ()
    return _Counted(counted, active_parameters(counted, shape), modules)


def _computed(config: Config, counted: _Counted | None, stated: Quantization | None) -> dict[str, Any]:
    """Weights without their files: counted from the dimensions, each layer as the configuration says it is stored."""
    main = stated.main if stated else "bf16"
    if counted is None:
        return {"native_precision": SERVED_AS.get(main, main)}
    parameters = _counts(counted.parameters)
    if stated is None:
        return {"native_precision": main, **parameters}
    if stated.strange or not counted.modules:
        note = f"not every layer its quantization names is understood: sized as if all linear layers were {main}"
        return {"native_precision": SERVED_AS.get(main, main), "notes": (note,), **parameters}
    named = [module for module in counted.modules if module.linear or (module.name == _HEAD and stated.names(_HEAD))]
    held = by_precision(stated, ((module.name, module.parameters) for module in named))
    most = max(held, key=lambda precision: (precision != "bf16", held[precision], precision))
    facts: dict[str, Any] = {"native_precision": SERVED_AS.get(most, most), **parameters}
    if all(precision in BYTES_PER_LINEAR_PARAMETER for precision in held):
        stored = sum(count * stated.bytes_per_parameter(precision) for precision, count in held.items())
        facts["native_bytes"] = int(stored) + (counted.parameters.total - held.total()) * SIXTEEN_BIT_BYTES
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


def _shape(config: Config, **more: int) -> tuple[Shape | None, tuple[str, ...]]:
    """The dimensions of a family counted from them alone, or None and what is missing."""
    wanted = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "num_hidden_layers")
    if absent := [key for key in wanted if config.integer(key) is None]:
        return None, (f"config.json has no {', '.join(absent)}",)
    groups, why = attention_groups(config)
    if why:
        return None, (why,)
    return _checked_shape(config, groups, experts(config), **more), ()


def _checked_shape(config: Config, groups: tuple[Attention, ...], moe: Experts | None, **more: int) -> Shape:
    hidden, heads = config.required("hidden_size"), config.required("num_attention_heads")
    try:
        return Shape(
            hidden=hidden,
            heads=heads,
            kv_heads=config.integer("num_key_value_heads") or heads,
            head_dim=config.integer("head_dim") or config.integer("attention_head_dim") or hidden // heads,
            ffn=feed_width(config),
            vocab=config.required("vocab_size"),
            tied=config.tied,
            attention=groups,
            experts=moe,
            mla=latent_attention(config),
            **more,
        )
    except (ValidationError, ZeroDivisionError) as problem:
        raise _impossible(config, problem) from problem


def _impossible(config: Config, problem: ValidationError | ZeroDivisionError) -> ModelError:
    return ModelError(f"{config.file}: impossible dimensions: {what_is_impossible(problem)}", field=str(config.file))


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
