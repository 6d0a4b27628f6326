"""How a checkpoint's weights are stored: quantization_config of config.json, or ModelOpt's hf_quant_config.json.

Formats: AMD Quark's export (vllm-project/vllm, layers/quantization/quark/quark.py), NVIDIA ModelOpt
(layers/quantization/modelopt.py; up to 0.29 it writes hf_quant_config.json, later config.json), compressed-tensors,
and the methods of Hugging Face transformers.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

from .parameters import BYTES_PER_LINEAR_PARAMETER

_SIXTEEN_BITS = "bf16"
# ModelOpt's quant_algo → how the weights are stored (modelopt.py LINEAR_ALGOS; TensorRT-LLM QuantAlgo).
_MODELOPT = {
    **dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_BLOCK_SCALES"), "fp8"),
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8"), "nvfp4"),
    **dict.fromkeys(("MXFP4", "W4A8_MXFP4_FP8", "W4A8_MXFP4_MXFP8", "W4A16_MXFP4"), "mxfp4"),
    **dict.fromkeys(("W4A16", "W4A16_AWQ", "W4A8_AWQ", "INT4_AWQ", "W4A16_GPTQ"), "int4"),
    **dict.fromkeys(("W8A16", "W8A16_GPTQ", "INT8_SQ", "W8A8_SQ_PER_CHANNEL"), "int8"),
    "MXFP8": "mxfp8",
}
# Quark's dtype → how the weights are stored; OCP MX is told apart by its scales (`_quark_stored`).
_QUARK = {
    **dict.fromkeys(("fp8_e4m3", "fp8_e5m2"), "fp8"),
    **dict.fromkeys(("int4", "uint4"), "int4"),
    **dict.fromkeys(("int8", "uint8"), "int8"),
    **dict.fromkeys(("bfloat16", "float16"), _SIXTEEN_BITS),
}
_OCP_MX = {"fp4": "mxfp4", "fp6_e3m2": "mxfp6", "fp6_e2m3": "mxfp6", "fp8_e4m3": "mxfp8", "fp8_e5m2": "mxfp8"}
_KEPT_KEYS = (
    *("exclude", "exclude_modules", "ignore", "ignored_layers"),
    *("modules_to_not_convert", "llm_int8_skip_modules"),
)
# MXFP8 is fp8 with a scale for every 32 values: other bytes, the same name to whoever serves it.
SERVED_AS = {"mxfp8": "fp8"}
# No published checkpoint has nearly so many; each is tried on each module.
_MOST_GLOBS = 4096


class Patterns:
    """Names of modules: plain ones (`lm_head`, `model.layers.0.mlp`), globs, and `re:` expressions as simple as globs.

    strange: expressions that are neither; what they match is not known here.
    """

    def __init__(self, patterns: Iterable[object]) -> None:
        wanted = [glob for pattern in patterns if isinstance(pattern, str) for glob in _as_globs(pattern)]
        globs = sorted({glob for glob in wanted if glob is not None and any(char in glob for char in "*?[")})
        self._plain = frozenset(glob for glob in wanted if glob is not None).difference(globs)
        self.strange = wanted.count(None) + (len(globs) if len(globs) > _MOST_GLOBS else 0)
        tried = globs[:_MOST_GLOBS]
        within = (fnmatch.translate(glob + end) for glob in tried for end in ("", ".*"))
        self._globs = re.compile("|".join(within)) if tried else None

    def match(self, name: str) -> bool:
        """Whether a pattern names that module, or a part of the model that holds it."""
        if self._globs is not None and self._globs.fullmatch(name):
            return True
        parts = name.split(".")
        spans = (parts[first:last] for first in range(len(parts)) for last in range(first + 1, len(parts) + 1))
        return bool(self._plain) and any(".".join(span) in self._plain for span in spans)


class Quantization(NamedTuple):
    """method: vLLM's name of it; precision: what the linear weights are stored in, unless they are `kept` at 16 bits
    or `parts` says otherwise (first match wins). widths: bytes of a parameter where its scales are stated, not those of
    BYTES_PER_LINEAR_PARAMETER."""

    method: str
    precision: str
    kept: Patterns
    parts: tuple[tuple[str, Patterns], ...] = ()
    widths: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, stated: Mapping[str, Any]) -> Self | None:
        """From a quantization_config or a whole hf_quant_config.json; None where it states nothing."""
        if isinstance(nested := stated.get("quantization"), dict):
            stated = nested
        method = str(stated.get("quant_method", "unknown"))
        if isinstance(stated.get("quant_algo"), str):
            return cls._modelopt(stated, "fp8" if method == "fp8" else _SIXTEEN_BITS)
        kept = Patterns(_kept(stated))
        if method == "quark":
            return cls._quark(stated, kept)
        # DeepSeek-V4: fp8 with a scale for a block, but its experts in fp4 with a scale for 32 values.
        fp4 = (("mxfp4", Patterns(["*.experts.*"])),) if stated.get("expert_dtype") == "fp4" else ()
        return cls(method, _precision(method, stated), kept, fp4, tuple(_widths(stated)))

    @classmethod
    def _modelopt(cls, stated: Mapping[str, Any], unnamed: str) -> Self:
        """unnamed: what layers are stored in that a mixture of precisions does not name."""
        algo, kept = stated["quant_algo"].upper(), Patterns(_kept(stated))
        layers = stated.get("quantized_layers")
        if algo != "MIXED_PRECISION" or not isinstance(layers, dict):
            return cls("modelopt", _MODELOPT.get(algo, algo.lower()), kept)
        by_precision: dict[str, list[str]] = {}
        for name, layer in layers.items():
            found = str(layer.get("quant_algo", "")).upper() if isinstance(layer, dict) else ""
            by_precision.setdefault(_MODELOPT.get(found, found.lower() or "unknown"), []).append(name)
        if unnamed != _SIXTEEN_BITS:
            kept = Patterns(())
        parts = tuple((precision, Patterns(names)) for precision, names in by_precision.items())
        return cls("modelopt", unnamed, kept, parts, tuple(_widths(stated)))

    @classmethod
    def _quark(cls, stated: Mapping[str, Any], kept: Patterns) -> Self:
        default = _quark_stored(stated.get("global_quant_config"))
        layers = stated.get("layer_quant_config")
        parts = [
            (stored, Patterns([pattern]))
            for pattern, layer in (layers.items() if isinstance(layers, dict) else ())
            if (stored := _quark_stored(layer)) != default
        ]
        return cls("quark", default, kept, tuple(parts))

    def stored(self, module: str) -> str:
        """What the weights of that module are stored in."""
        if self.kept.match(module):
            return _SIXTEEN_BITS
        return next((precision for precision, named in self.parts if named.match(module)), self.precision)

    def names(self, module: str) -> bool:
        """Whether it says of that very module how it is stored."""
        return any(named.match(module) for _, named in self.parts)

    def bytes_per_parameter(self, precision: str) -> float:
        """Of weights stored so, with their scales."""
        return dict(self.widths).get(precision, BYTES_PER_LINEAR_PARAMETER[precision])

    @property
    def main(self) -> str:
        """What most modules are said to be stored in, where their sizes are not known."""
        quantised = [self.precision, *(precision for precision, _ in self.parts)]
        return next((precision for precision in quantised if precision != _SIXTEEN_BITS), _SIXTEEN_BITS)

    @property
    def strange(self) -> int:
        """Patterns of modules that are not understood: sizes by name are not to be trusted then."""
        return self.kept.strange + sum(named.strange for _, named in self.parts)


def _as_globs(pattern: str) -> list[str | None]:
    """The pattern as globs, names as in a text-only model; None for a regular expression that is more than that."""
    if not pattern.startswith("re:"):
        return [_text_only(pattern)]
    plain = pattern.removeprefix("re:").removeprefix("^").removesuffix("$").replace(r"\.", ".").replace(".*", "*")
    # One group of alternatives, as in `mlp.(gate|up|down)_proj`.
    before, opened, rest = plain.partition("(")
    inside, closed, after = rest.partition(")")
    each = [before + one + after for one in inside.split("|")] if opened and closed else [plain]
    return [None if re.search(r"[\\()|+{}^$\[\]?]", glob) else _text_only(glob) for glob in each]


def _text_only(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("language_model.model.", "model.")


def _widths(stated: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Bytes of a parameter where the size of the blocks that share a scale is stated: fp8 with a float32 a block,
    4 bits with 16 a group (compressed-tensors' pack-quantized).
    """
    block = stated.get("weight_block_size")
    if isinstance(block, list) and block and all(isinstance(side, int) and side > 0 for side in block):
        yield "fp8", 1 + 4 / math.prod(block)
    weights = _compressed_weights(stated)
    group = weights.get("group_size")
    if weights.get("type") == "int" and weights.get("num_bits") == 4 and isinstance(group, int) and group > 0:
        yield "int4", 0.5 + 2 / group


def _kept(stated: Mapping[str, Any]) -> list[object]:
    return [name for key in _KEPT_KEYS if isinstance(stated.get(key), list) for name in stated[key]]


def _quark_stored(config: object) -> str:
    """Of one of Quark's layer configurations: its `weight` is one specification, or stages of which the last is stored.

    NVFP4 is the exception: its second stage quantises the scales of the first.
    """
    weight = config.get("weight") if isinstance(config, dict) else None
    stages = weight if isinstance(weight, list) else [weight]
    specs = [stage for stage in stages if isinstance(stage, dict)]
    if not specs:
        return _SIXTEEN_BITS
    if len(specs) > 1 and specs[0].get("dtype") == "fp4":
        return "nvfp4"
    dtype = str(specs[-1].get("dtype"))
    ocp = specs[-1].get("scale_format") == "e8m0" or "e8m0" in str(specs[-1].get("scale_type"))
    return _OCP_MX.get(dtype, dtype) if ocp or dtype.startswith(("fp4", "fp6")) else _QUARK.get(dtype, dtype)


def _precision(method: str, stated: Mapping[str, Any]) -> str:
    """What the other methods store: fp8, int8, int4, mxfp4, or the method's own name where it does not say."""
    if method in ("fp8", "fbgemm_fp8", "mxfp4"):
        return method.removeprefix("fbgemm_")
    if method == "bitsandbytes":
        return "int4" if stated.get("load_in_4bit") or stated.get("_load_in_4bit") else "int8"
    weights = _compressed_weights(stated) if method == "compressed-tensors" else stated
    bits = weights.get("num_bits", weights.get("bits"))
    if weights.get("type") == "float":
        four = "mxfp4" if weights.get("group_size") == 32 else "nvfp4"
        return {8: "fp8", 4: four}.get(bits, method) if isinstance(bits, int) else method
    return {4: "int4", 8: "int8"}.get(bits, method) if isinstance(bits, int) else method


def _compressed_weights(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = stated.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else {}


def by_precision(quantization: Quantization, modules: Iterable[tuple[str, int]]) -> Counter[str]:
    """Parameters of (name, parameters) modules by what they are stored in."""
    found: Counter[str] = Counter()
    for name, parameters in modules:
        found[quantization.stored(name)] += parameters
    return found
