"""What of config.json becomes GGUF metadata, and which models that describes fully; the others are refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aim_trainer.errors import JobError

#: Architectures that llama.cpp computes as `llama`, tensor for tensor.
FAMILY = ("LlamaForCausalLM", "MistralForCausalLM")
#: Fields of config.json that change the computation and have no place in `llama`'s metadata, with what they mostly are.
_MUST_BE = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "sliding_window": None}


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a Llama. rope_factors: (head_dim / 2,), divisors of the rotary frequencies, or None."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    epsilon: float
    rope_base: float
    rope_factors: npt.NDArray[np.float32] | None
    rope_linear: float | None


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Of a config.json. Raises JobError: not of the family, or with a field that `llama` cannot say."""
    named = (config.get("architectures") or ["no architecture"])[0]
    if named not in FAMILY:
        raise _refused(f"{named} is not of the Llama family ({', '.join(FAMILY)})", named)
    for field, usual in _MUST_BE.items():
        if config.get(field, usual) not in (usual, None):
            raise _refused(f"{named} with {field}: {config[field]} is not what llama.cpp computes as llama", field)
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    base, factors, linear = _rope(config, head_dim)
    return Shape(
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        ffn=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        vocab=int(config["vocab_size"]),
        context=int(config["max_position_embeddings"]),
        epsilon=float(config["rms_norm_eps"]),
        rope_base=base,
        rope_factors=factors,
        rope_linear=linear,
    )


def _rope(config: Mapping[str, Any], head_dim: int) -> tuple[float, npt.NDArray[np.float32] | None, float | None]:
    """transformers 5 keeps everything under rope_parameters, 4 the base beside rope_scaling."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(said.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = said.get("rope_type") or said.get("type") or "default"
    if kind == "default":
        return base, None, None
    if kind == "linear":
        return base, None, float(said["factor"])
    if kind == "llama3":
        return base, _llama3_factors(said, base, head_dim), None
    raise _refused(f"rotary scaling {kind!r} is not exported (default, linear and llama3 are)", kind)


def _llama3_factors(said: Mapping[str, Any], base: float, head_dim: int) -> npt.NDArray[np.float32]:
    """Llama 3.1's scaling by wavelength (transformers, modeling_rope_utils._compute_llama3_parameters), as divisors."""
    factor, original = float(said["factor"]), float(said["original_max_position_embeddings"])
    low, high = float(said["low_freq_factor"]), float(said["high_freq_factor"])
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, between))
    return factors.astype(np.float32)


def _refused(why: str, value: object) -> JobError:
    return JobError(
        f"spec.output.gguf: {why}",
        field="spec.output.gguf",
        value=value,
        remedy="set output.gguf: false and serve the published weights with vLLM",
    )
